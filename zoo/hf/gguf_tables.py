"""What the architectures of GGUF files call their settings and tensors, and what they leave unsaid.

The names are those of the package gguf (`gguf.constants`); what files leave unsaid is what llama.cpp takes for granted.
A file is read through the configuration table of the family that it is of, and through a table of weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.hf.families.gemma import GEMMA, GEMMA2, GEMMA3_TEXT
from zoo.hf.families.llama import LLAMA
from zoo.hf.families.mixtral import MIXTRAL
from zoo.hf.families.qwen2 import QWEN2, QWEN2_MOE
from zoo.hf.families.qwen3 import QWEN3, QWEN3_MOE
from zoo.hf.family import Family
from zoo.hf.weights import Known, Same, Shape, Stored, WeightRow
from zoo.spec.attention import AttentionSpec

BLOCK = "blk.{n}"
MIXER, FFN = "layers.{n}.mixer", "layers.{n}.ffn"


@dataclass(frozen=True)
class Stacked:
    """Stacked experts [e, parts * f, d], stored as one stack [e, f, d] for each part."""

    zoo: str
    parts: tuple[str, ...]
    """Names of the stacks, from the top."""

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        experts, height, width = shape
        rows = height // len(self.parts)
        for index, part in enumerate(self.parts):
            view = partial(torch.narrow, dim=1, start=index * rows, length=rows)
            yield Stored(part.format(n=layer), (experts, rows, width), self.zoo.format(n=layer), view)


@dataclass(frozen=True)
class InTurns:
    """Rows of heads whose two halves are stored in turns: channels that rotate together stand side by side."""

    zoo: str
    name: str
    num_heads: int

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        view = partial(_halves, num_heads=self.num_heads)
        part = partial(_pairs, num_heads=self.num_heads)
        yield Stored(self.name.format(n=layer), shape, self.zoo.format(n=layer), view, part)


@dataclass(frozen=True)
class Vector:
    """A matrix of one row that is stored as a vector."""

    zoo: str
    name: str

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        yield Stored(
            self.name.format(n=layer), shape[1:], self.zoo.format(n=layer), partial(torch.select, dim=0, index=0)
        )


def _halves(parameter: Tensor, num_heads: int) -> Tensor:
    return parameter.unflatten(0, (num_heads, 2, -1))


def _pairs(tensor: Tensor, num_heads: int) -> Tensor:
    return tensor.unflatten(0, (num_heads, -1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`, or one of the models that share its name."""

    family: Family
    """Its table of weights replaced by that of GGUF files."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Settings, without the architecture's name before them, to keys of config.json; beside `COMMON_KEYS`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What files leave unsaid."""
    told_by: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json that are true where the file holds a tensor of this name."""
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    """Further keys of config.json, from those that are known."""
    plus_one: bool = False
    """Norm weights are stored with the 1 that the model adds to them."""


COMMON_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
NEEDED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
EXPERT_KEYS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}


def _same(zoo: str, name: str) -> Iterator[WeightRow]:
    for kind in ("weight", "bias"):
        yield Same(f"{zoo}.{kind}", (f"{name}.{kind}",))


def _trunk() -> Iterator[WeightRow]:
    for zoo, name in {"embed": "token_embd", "norm": "output_norm", "head": "output"}.items():
        yield Same(f"{zoo}.weight", (f"{name}.weight",))
    for zoo, name in {"mixer_norm": "attn_norm", "ffn_norm": "ffn_norm"}.items():
        yield Same(f"layers.{{n}}.{zoo}.weight", (f"{BLOCK}.{name}.weight",))


def _attention() -> Iterator[WeightRow]:
    for zoo, name in {"q": "q", "k": "k", "v": "v", "out": "output", "q_norm": "q_norm", "k_norm": "k_norm"}.items():
        yield from _same(f"{MIXER}.{zoo}", f"{BLOCK}.attn_{name}")


def _mlp() -> Iterator[WeightRow]:
    for part in ("gate", "up", "down"):
        yield from _same(f"{FFN}.{part}", f"{BLOCK}.ffn_{part}")


def _post_norms() -> Iterator[WeightRow]:
    for zoo, name in {"mixer_post_norm": "post_attention_norm", "ffn_post_norm": "post_ffw_norm"}.items():
        yield Same(f"layers.{{n}}.{zoo}.weight", (f"{BLOCK}.{name}.weight",))


def _moe() -> Iterator[WeightRow]:
    yield Same(f"{FFN}.router.weight", (f"{BLOCK}.ffn_gate_inp.weight",))
    yield Stacked(f"{FFN}.experts.gate_up", (f"{BLOCK}.ffn_gate_exps.weight", f"{BLOCK}.ffn_up_exps.weight"))
    yield Stacked(f"{FFN}.experts.down", (f"{BLOCK}.ffn_down_exps.weight",))


def _shared_expert() -> Iterator[WeightRow]:
    for part in ("gate", "up", "down"):
        yield Same(f"{FFN}.shared.{part}.weight", (f"{BLOCK}.ffn_{part}_shexp.weight",))
    yield Vector(f"{FFN}.shared_gate.weight", f"{BLOCK}.ffn_gate_inp_shexp.weight")


def _turning(spec: AttentionSpec) -> Iterator[WeightRow]:
    """Queries and keys of files whose rotations turn neighbouring channels."""
    for part, num_heads in {"q": spec.num_heads, "k": spec.num_kv_heads}.items():
        for kind in ("weight", "bias"):
            yield InTurns(f"{MIXER}.{part}.{kind}", f"{BLOCK}.attn_{part}.{kind}", num_heads)


def _stored(family: Family, *further: WeightRow, in_turns: bool = False) -> Family:
    """A family whose tensors have the names of GGUF files."""
    slots = {
        name: replace(slot, weights=_turning if in_turns and slot.spec is AttentionSpec else None)
        for name, slot in family.slots.items()
    }
    return replace(
        family,
        slots=slots,
        weights=(*_trunk(), *_attention(), *_mlp(), *further),
        tied_head=("output.weight", "token_embd.weight"),
        ignored_weights=(r"rope_freqs\.weight",),
        layouts=(),
        mtp=None,
    )


def _root_of_head_dim(config: Mapping[str, Any], by_width: int) -> dict[str, Any]:
    """The divisor of attention scores: by the width of a head, but for the deepest model of the generation."""
    deepest = config["num_hidden_layers"] == by_width
    return {
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if deepest
        else config["head_dim"]
    }


_BIASED = {"attention_bias": "blk.0.attn_q.bias"}
_WINDOWED = {"attention.sliding_window": "sliding_window"}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_stored(LLAMA, in_turns=True), told_by={**_BIASED, "mlp_bias": "blk.0.ffn_gate.bias"}),
    "qwen2": Architecture(_stored(QWEN2)),
    "qwen3": Architecture(_stored(QWEN3), told_by=_BIASED),
    "qwen2moe": Architecture(
        _stored(QWEN2_MOE, *_moe(), *_shared_expert()),
        {
            **EXPERT_KEYS,
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        {"norm_topk_prob": False},
        told_by={"qkv_bias": "blk.0.attn_q.bias"},
    ),
    "qwen3moe": Architecture(
        _stored(QWEN3_MOE, *_moe()),
        {**EXPERT_KEYS, "expert_feed_forward_length": "moe_intermediate_size"},
        {"norm_topk_prob": True},
        told_by=_BIASED,
    ),
    "gemma": Architecture(_stored(GEMMA), plus_one=True),
    "gemma2": Architecture(
        _stored(GEMMA2, *_post_norms()),
        {
            **_WINDOWED,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        derive=partial(_root_of_head_dim, by_width=46),
        plus_one=True,
    ),
    "gemma3": Architecture(
        _stored(GEMMA3_TEXT, *_post_norms()),
        {**_WINDOWED, "rope.freq_base_swa": "rope_local_base_freq"},
        derive=partial(_root_of_head_dim, by_width=62),
        plus_one=True,
    ),
}
WITH_EXPERTS: Mapping[str, Architecture] = {
    "llama": Architecture(
        _stored(MIXTRAL, *_moe(), in_turns=True),
        {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    ),
}
"""What the name means in files that have experts."""
