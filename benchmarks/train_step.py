"""A whole training step on this CPU takes less time and memory than transformers' at its best setting.

The same weights (`zoo.save_pretrained`), the same batch; losses are compared first. Both run in one process with the
same settings (`zoo.tuning`), transformers with grouped_mm experts, SDPA and fused AdamW. Memory is the most that a
step of a fresh process takes above the start, weights and optimizer state included.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

import zoo
import zoo.decoder
from benchmarks.harness import Row, interleaved, peak_extra_mib
from zoo.native.library import library
from zoo.tuning import tune

VOCAB, BATCH, SEQ_LEN = 32000, 8, 512
MODELS: dict[str, tuple[str, ...]] = {
    "MoE": (
        "tiny_moe",
        "model.attention={num_heads:8,num_kv_heads:2,head_dim:64}",
        "model.moe={num_experts:16,top_k:2,d_expert:512,balance:{aux_loss:0.0,z_loss:0.0}}",
        "model.layers='8*sparse'",
    ),
    "dense": (
        "tiny_dense",
        "model.attention={num_heads:8,num_kv_heads:2,head_dim:64}",
        "model.mlp={d_ffn:1024}",
        "model.layers='8*dense'",
    ),
    "Mamba-2 hybrid": (
        "granite4_h_micro",
        "model.attention={num_heads:8,num_kv_heads:2,head_dim:64}",
        "model.mamba={num_heads:16,head_dim:64,d_state:64,chunk_size:256}",
        "model.mlp={d_ffn:1024}",
        "model.layers='2*(3*mamba_dense attention_dense)'",
    ),
}


def rows() -> list[Row]:
    print(*tune(), sep="\n", flush=True)
    found = []
    for name in MODELS:
        found += model_rows(name)
    return found


def model_rows(name: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        steps = {who: step(model) for who, model in models(name, folder, ("zoo", "transformers")).items()}
        mine, theirs = (float(run()) for run in steps.values())
        if abs(mine - theirs) > 1e-3 * theirs:
            raise ValueError(f"{name}: the losses are {mine} and {theirs}")
        seconds = interleaved(steps, rounds=3, warmup=1)
        del steps
        peaks = {who: _apart(name, folder, who) for who in seconds}
    what = f"{name}, {BATCH} x {SEQ_LEN} tokens, vocabulary {VOCAB}"
    return [
        Row(
            f"step: {what}",
            *(f"{who} {t:.2f} s" for who, t in seconds.items()),
            seconds["transformers"] / seconds["zoo"],
        ),
        Row(
            f"memory: {what}", *(f"{who} {m:.0f} MiB" for who, m in peaks.items()), peaks["transformers"] / peaks["zoo"]
        ),
    ]


def models(name: str, folder: str, who: tuple[str, ...]) -> dict[str, nn.Module]:
    """The models that `who` names, with equal weights, by way of a checkpoint in `folder`."""
    base, *overrides = MODELS[name]
    found: dict[str, nn.Module] = {}
    if "zoo" in who:
        torch.manual_seed(0)
        found["zoo"] = zoo.build(zoo.load(base, "model.d_model=512", f"model.vocab_size={VOCAB}", *overrides))
        zoo.save_pretrained(found["zoo"], folder)
    if "transformers" in who:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        if name == "MoE":
            theirs.set_experts_implementation("grouped_mm")
        theirs.config.use_cache = False
        found["transformers"] = theirs
    return {key: model.train() for key, model in found.items()}


def step(model: nn.Module) -> Callable[[], Any]:
    """One optimizer step on tokens drawn anew; its loss."""
    optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    def run() -> Any:
        tokens = torch.randint(VOCAB, (BATCH, SEQ_LEN + 1), generator=generator)
        if isinstance(model, zoo.decoder.Decoder):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:].contiguous()).total
        else:
            loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def _apart(name: str, folder: str, who: str) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step_peak_mib, name, folder, who).result()


def step_peak_mib(name: str, folder: str, who: str) -> float:
    """Of the first two steps, model and optimizer included; the modules are loaded before."""
    library()

    def run() -> None:
        (model,) = models(name, folder, (who,)).values()
        take = step(model)
        for _ in range(2):
            take()

    return peak_extra_mib(run)
