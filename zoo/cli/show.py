"""`zoo show`: one model, its layers and blocks, its parameters and FLOPs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from zoo.cli.console import Parser, add_seq_len, table, title, write
from zoo.cli.wording import claim_against, in_words, said, seq_len_for, short_count
from zoo.config import load
from zoo.spec.model import ModelSpec

EXAMPLES = """\
  zoo show tiny_moe
  zoo show tiny_moe model.moe.num_experts=64 model/moe/router=sigmoid --seq-len 8192"""


def run(arguments: Sequence[str]) -> None:
    """Print what a model is and what it costs."""
    usage = "MODEL [overrides] [--seq-len N] [--json]"
    parser = Parser("show", usage, "Show a model: its layers and blocks, parameters and FLOPs.", EXAMPLES)
    parser.add_argument("asked", nargs="+", metavar="MODEL", help="a name of 'zoo list'; then changes, as in Hydra")
    parser.add_argument("--json", action="store_true", help="the whole description and its counts, for programs")
    add_seq_len(parser)
    given = parser.read(arguments)
    spec = load(*given.asked)
    seq_len = seq_len_for([spec], given.seq_len)
    if given.json:
        print(json.dumps(_facts(spec, seq_len), indent=1))
    else:
        write(*_about(spec), title("Layers"), _layers(spec), title("Blocks"), _blocks(spec), *_costs(spec, seq_len))


def _about(spec: ModelSpec) -> list[RenderableType]:
    card = spec.card
    family = f" ({card.family})" if card else ""
    size = f"{spec.num_layers} layers of width {spec.d_model:,}, {spec.vocab_size:,} tokens in the vocabulary"
    context = f", sequences up to {card.context:,}" if card else ""
    lines: list[RenderableType] = [Text.assemble((spec.name, "bold"), f"{family}: {size}{context}")]
    return [*lines, Text(f"source: {card.source}", style="dim")] if card else lines


def _layers(spec: ModelSpec) -> RenderableType:
    counts = Counter(spec.layer_kinds)
    rows = [
        (f"{counts[name]} x", name, " + ".join(slot for slot in (kind.mixer, kind.ffn, kind.beside) if slot))
        for name, kind in spec.kinds.items()
    ]
    rows += [(f"{spec.mtp.depth} x", "mtp", f"{spec.mtp.layers}, predicts further tokens")] if spec.mtp else []
    head = ("", "kind", f"blocks, in the order {spec.layers}")
    return table(head, rows, right=head[:1], fold=head[2:])


def _blocks(spec: ModelSpec) -> RenderableType:
    rest = {"slots", "kinds", "layers", "name", "card", "mtp", "d_model", "vocab_size"}
    rows = [(name, *_settings(said(block))) for name, block in spec.slots.items()]
    rows.append(("around them", *_settings(said(spec, without=rest))))
    return table(("block", "type", "settings"), rows, fold=("settings",))


def _settings(settings: dict[str, Any]) -> tuple[str, str]:
    """The type, and the other settings in words."""
    settings = dict(settings)
    kind = settings.pop("type", "")
    return str(kind), in_words(settings) or "as by default"


def _costs(spec: ModelSpec, seq_len: int) -> list[RenderableType]:
    params, flops = spec.params(), spec.flops(seq_len)
    rows: list[tuple[Any, ...]] = []
    for part in _in_order([*params.by_block, *flops.by_block]):
        share = params.by_block.get(part)
        counts = [f"{share.total:,}", f"{share.active:,}", f"{share.total / params.total:.1%}"] if share else [""] * 3
        rows.append((part, *counts, short_count(flops.by_block[part]) if part in flops.by_block else ""))
    totals = ("all", f"{params.total:,}", f"{params.active:,}", "100.0%", short_count(flops.total))
    rows.append(tuple(Text(cell, style="bold") for cell in totals))
    head = ("part", "parameters", "active", "share", "FLOPs per token")
    looked_up = "" if params.tied else f"; {params.active_without_lookup:,} without the one that is only looked up"
    notes = [
        f"active: what one token touches, with the whole embedding tables{looked_up}",
        f"FLOPs: forward, at {seq_len:,} tokens a sequence; training takes three times as many",
        *_claims(spec),
    ]
    return [title("Costs"), table(head, rows, right=head[1:]), *(Text(note, style="dim") for note in notes)]


def _in_order(parts: Sequence[str]) -> list[str]:
    """The parts of each block together, blocks in the order of their first parts."""
    blocks = list(dict.fromkeys(part.split(".")[0] for part in parts))
    return sorted(dict.fromkeys(parts), key=lambda part: blocks.index(part.split(".")[0]))


def _claims(spec: ModelSpec) -> list[str]:
    if spec.card is None:
        return []
    params = spec.params()
    claims = [
        claim_against("parameters", spec.card.claimed_total, [params.total]),
        claim_against("active", spec.card.claimed_active, [params.active, params.active_without_lookup]),
    ]
    return [f"claimed by its makers: {'; '.join(claim for claim in claims if claim)}"] if any(claims) else []


def _facts(spec: ModelSpec, seq_len: int) -> dict[str, Any]:
    params, flops = spec.params(), spec.flops(seq_len)
    return {
        "name": spec.name,
        "model": spec.to_dict(),
        "params": {
            "total": params.total,
            "active": params.active,
            "embedding": params.embedding,
            "by_block": {name: share._asdict() for name, share in params.by_block.items()},
        },
        "flops_per_token": {"seq_len": seq_len, "total": flops.total, "by_block": dict(flops.by_block)},
    }
