"""A whole training step on this CPU takes less time and memory than transformers' at its best setting.

The same weights (`zoo.save_pretrained`), the same batch; losses are compared first. Both run in one process with the
same settings (`zoo.tuning`), transformers with grouped_mm experts, SDPA and fused AdamW. Memory is the peak of a step
by the counters of torch's allocator (`benchmarks.meter`), weights and optimizer state included, in a process each.

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
from benchmarks.harness import Row, interleaved
from benchmarks.meter import held_bytes, peaks_of
from zoo.native.library import library
from zoo.tuning import tune

VOCAB, BATCH, SEQ_LEN = 32000, 8, 512
MIB = 2**20
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
WHO = ("zoo", "transformers")


PARTS = tuple(f"{name} {what}" for name in MODELS for what in ("step", "memory"))


def rows(part: str | None = None) -> list[Row]:
    """All rows, or those of one of `PARTS`."""
    print(*tune(), sep="\n", flush=True)
    rounds = 3 if part is None else 1  # a part has a minute
    return [_row(name, rounds) for name in PARTS if part in (None, name)]


def _row(part: str, rounds: int) -> Row:
    name, _, what = part.rpartition(" ")
    return time_row(name, rounds) if what == "step" else memory_row(name)


def _what(name: str) -> str:
    return f"{name}, {BATCH} x {SEQ_LEN} tokens, vocabulary {VOCAB}"


def time_row(name: str, rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        steps = {who: step(model)[0] for who, model in models(name, folder, WHO).items()}
    mine, theirs = (float(run()) for run in steps.values())  # this warms up, too
    if abs(mine - theirs) > 1e-3 * theirs:
        raise ValueError(f"{name}: the losses are {mine} and {theirs}")
    seconds = interleaved(steps, rounds, warmup=0)
    ratio = seconds["transformers"] / seconds["zoo"]
    return Row(f"step: {_what(name)}", *(f"{who} {seconds[who]:.2f} s" for who in WHO), ratio, "bar 1.5")


def memory_row(name: str) -> Row:
    peaks = {who: _apart(name, who) for who in WHO}
    ratio = peaks["transformers"] / peaks["zoo"]
    return Row(f"memory: {_what(name)}", *(f"{who} {peaks[who]:.0f} MiB" for who in WHO), ratio, "bar 2")


def models(name: str, folder: str, who: tuple[str, ...]) -> dict[str, nn.Module]:
    """The models that `who` names, with equal weights, by way of a checkpoint in `folder`."""
    base, *overrides = MODELS[name]
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {
        "zoo": zoo.build(zoo.load(base, "model.d_model=512", f"model.vocab_size={VOCAB}", *overrides))
    }
    if "transformers" in who:
        zoo.save_pretrained(found["zoo"], folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        if name == "MoE":
            theirs.set_experts_implementation("grouped_mm")
        theirs.config.use_cache = False
        found["transformers"] = theirs
    return {key: found[key].train() for key in who}


def step(model: nn.Module) -> tuple[Callable[[], Any], AdamW]:
    """One optimizer step on tokens drawn anew, which gives its loss; and the optimizer."""
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

    return run, optimizer


def _apart(name: str, who: str) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step_peak_mib, name, who).result()


def step_peak_mib(name: str, who: str) -> float:
    """Of the second step, when the optimizer has its state."""
    library()
    with tempfile.TemporaryDirectory() as folder:
        (model,) = models(name, folder, (who,)).values()
    take, optimizer = step(model)
    take()
    return peaks_of(take, held_bytes(model, [optimizer])).peak / MIB
