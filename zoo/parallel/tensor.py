"""Tensor parallelism with sequence parallelism: how each block is cut along tp.

A block that is cut is a smaller block: its description names the heads of this process, its parameters are those of
these heads. It reads all tokens and writes a part of a sum; between blocks every process has its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from zoo.blocks.attention import Attention
from zoo.blocks.base import Block
from zoo.blocks.mamba2 import Mamba2
from zoo.blocks.mla import MLA
from zoo.blocks.mlp import MLP
from zoo.blocks.moe import MoE
from zoo.decoder import Decoder
from zoo.parallel.cuts import Cut, cut_module
from zoo.parallel.sequence import gather_tokens, scatter_tokens
from zoo.parallel.vocabulary import cut_vocabulary
from zoo.spec.base import ConfigError

Cuts = dict[str, Cut]
"""By the name of a parameter below its block; parameters that are not named are whole on every process."""
COLUMNS, ROWS = Cut((Shard(0),)), Cut((Shard(1),))
"""Of a matrix [n, k]: outputs cut, inputs cut."""


def cut_tensors(model: Decoder, tp: DeviceMesh) -> None:
    """Cut all that is not a routed expert along `tp`.

    Raises:
        ConfigError: a block cannot be cut into as many parts.
    """
    cuts: dict[int, Cuts] = {}
    for name, block in model.named_modules():
        if isinstance(block, Block):
            chosen = _cuts_of(name, block, tp)
            for parameter in chosen.keys() & dict(block.named_parameters()).keys():
                path, _, own = parameter.rpartition(".")
                cuts.setdefault(id(block.get_submodule(path)), {})[own] = chosen[parameter]
    experts = {id(part) for moe in model.moe_layers().values() for part in moe.experts.modules()}
    tables = {id(model.embed), id(model.head)}
    for module in model.modules():
        if id(module) not in experts | tables:
            cut_module(module, _with_defaults(module, cuts.get(id(module), {})), tp)
    cut_vocabulary(model, tp)


def _with_defaults(module: nn.Module, cuts: Cuts) -> Cuts:
    """Of the trained parameters that the module itself holds; others are no work of gradients and stay as they are."""
    names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
    return {name: cuts.get(name, Cut()) for name in names}


def _cuts_of(name: str, block: Block, tp: DeviceMesh) -> Cuts:
    """Tell a block of its part; the cuts of its parameters."""
    if isinstance(block, MoE):  # its router works on the own tokens; its parts are blocks of their own
        return {}
    rule = _RULES.get(type(block))
    if rule is None:
        raise ConfigError(f"layout.tp: found {tp.size()}; {name} ({type(block).__name__}) cannot be cut: set tp to 1")
    _on_all_tokens(block, tp)
    try:
        return rule(block, tp)
    except _Uncuttable as reason:
        raise ConfigError(f"layout.tp: found {tp.size()}; {name} has {reason}") from None


class _Uncuttable(Exception):
    """What a block has that does not go with a degree."""


def _on_all_tokens(block: Block, tp: DeviceMesh) -> None:
    compute = block.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return scatter_tokens(compute(gather_tokens(x, tp), *args, **kwargs), tp)

    block.forward = forward


def _mlp(block: MLP, tp: DeviceMesh) -> Cuts:
    if block.spec.d_ffn % tp.size():
        raise _Uncuttable(f"d_ffn {block.spec.d_ffn}: tp must divide it")
    return {
        "gate.weight": COLUMNS,
        "gate.bias": COLUMNS,
        "up.weight": COLUMNS,
        "up.bias": COLUMNS,
        "down.weight": ROWS,
        "down.bias": _of_first(tp),
    }


def _attention(block: Attention, tp: DeviceMesh) -> Cuts:
    spec, size = block.spec, tp.size()
    if spec.qk_norm == "full":
        raise _Uncuttable("qk_norm full, which is taken over all heads: set tp to 1")
    if spec.indexer is not None:
        raise _Uncuttable("an indexer, which chooses for all heads: set tp to 1")
    heads, groups = _part(spec.num_heads, tp, "num_heads"), spec.num_kv_heads
    kept = [COLUMNS, COLUMNS]
    if groups % size == 0:
        groups //= size
    elif size % groups == 0:
        # Fewer heads of keys than processes: each has all of them and works with the one that its queries need.
        mine, groups = tp.get_local_rank() * groups // size, 1
        widths = (block.head_dim, block.v_head_dim)
        kept = [Cut((Replicate(),), torch.arange(mine * width, (mine + 1) * width)) for width in widths]
    else:
        raise _Uncuttable(f"num_kv_heads {groups}: tp must divide it, or be a multiple of it")
    block.spec = spec.replace(num_heads=heads, num_kv_heads=groups)
    cuts = {"out.weight": ROWS, "out.bias": _of_first(tp), "sink": COLUMNS}
    for part, chosen in (("q", COLUMNS), ("k", kept[0]), ("v", kept[1]), ("gate", COLUMNS)):
        cuts |= {f"{part}.weight": chosen, f"{part}.bias": chosen}
    return cuts


def _mla(block: MLA, tp: DeviceMesh) -> Cuts:
    if block.spec.indexer is not None:
        raise _Uncuttable("an indexer, which chooses for all heads: set tp to 1")
    block.spec = block.spec.replace(num_heads=_part(block.spec.num_heads, tp, "num_heads"))
    # The latents are no more than a process needs whole; each computes them.
    columns = {f"{part}.weight": COLUMNS for part in ("q", "k", "v", "gate")}
    return {**columns, "out.weight": ROWS, "out.bias": _of_first(tp)}


def _mamba2(block: Mamba2, tp: DeviceMesh) -> Cuts:
    spec, size, rank = block.spec, tp.size(), tp.get_local_rank()
    if spec.norm_span == "full":
        raise _Uncuttable("norm_span full, a norm over all heads: set tp to 1")
    heads, groups = _part(spec.num_heads, tp, "num_heads"), _part(spec.num_groups, tp, "num_groups")
    # The channels of x, b and c stand one after the other: of each of them, those of this process.
    parts = torch.arange(spec.d_conv).split((spec.d_inner, *[spec.num_groups * spec.d_state] * 2))
    channels = Cut((Replicate(),), torch.cat([part.chunk(size)[rank] for part in parts]))
    block.spec = spec.replace(num_heads=heads, num_groups=groups)
    block.conv.channels, block.norm.num_spans = block.spec.d_conv, groups
    cuts = {"out.weight": ROWS, "out.bias": _of_first(tp), "conv.weight": channels, "conv.bias": channels}
    for part in ("z", "x", "b", "c", "dt"):
        cuts |= {f"{part}.weight": COLUMNS, f"{part}.bias": COLUMNS}
    return cuts | dict.fromkeys(("a_log", "dt_bias", "skip", "norm.weight"), COLUMNS)


def _part(whole: int, tp: DeviceMesh, name: str) -> int:
    if whole % tp.size():
        raise _Uncuttable(f"{name} {whole}: tp must divide it")
    return whole // tp.size()


def _of_first(tp: DeviceMesh) -> Cut:
    """A bias that is added to a sum whose parts all processes have."""
    return Cut((Replicate(),), silent=tp.get_local_rank() > 0)


_RULES: dict[type[Block], Callable[[Any, DeviceMesh], Cuts]] = {
    Attention: _attention,
    MLA: _mla,
    MLP: _mlp,
    Mamba2: _mamba2,
}
