"""`zoo diff`: what differs between two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.cli.console import Parser, add_seq_len, table, title, write
from zoo.cli.wording import as_yaml, flat, in_words, said, seq_len_for, short_count
from zoo.config import load
from zoo.spec.base import ConfigError
from zoo.spec.model import ModelSpec

EXAMPLES = """\
  zoo diff tiny_moe tiny_dense
  zoo diff tiny_moe model.moe.num_experts=64                    one model, and the same with a change
  zoo diff tiny_moe tiny_moe model/moe/router=sigmoid           the same: overrides belong to the model before them"""
ABSENT = "-"


def run(arguments: Sequence[str]) -> None:
    """Print the settings and counts in which two models differ."""
    usage = "MODEL [overrides] [MODEL [overrides]] [--seq-len N]"
    parser = Parser("diff", usage, "Show the settings and costs in which two models differ.", EXAMPLES)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a name of 'zoo list'; overrides follow their model")
    add_seq_len(parser)
    given = parser.read(arguments)
    asked = _asked(given.models)
    specs = [load(*model) for model in asked]
    names = [" ".join(model) for model in asked]
    settings = _settings(*specs)
    write(table(("setting", *names), settings, fold=names) if settings else "the settings are the same")
    head = ("", *names, "ratio")
    write(title("Costs"), table(head, _costs(specs, given.seq_len), right=head[1:], fold=names))


def _asked(words: Sequence[str]) -> list[list[str]]:
    """Two models with the overrides that follow each; a single one with overrides is held against itself without."""
    models: list[list[str]] = []
    for word in words:
        if "=" not in word and not word.startswith("~"):
            models.append([word])
        elif models:
            models[-1].append(word)
        else:
            raise ConfigError(f"zoo diff: found {word} first; name a model before its overrides")
    if len(models) == 1 and len(models[0]) > 1:
        models.insert(0, models[0][:1])
    if len(models) != 2:
        raise ConfigError(f"zoo diff: found {len(models)} models; name two, or one with overrides")
    return models


def _settings(first: ModelSpec, second: ModelSpec) -> list[tuple[str, ...]]:
    """Rows for the settings that differ. A block that only one of them has is one row."""
    rows: list[tuple[str, ...]] = []
    for slot in dict.fromkeys([*first.slots, *second.slots]):
        sides = [spec.slots[slot].type if slot in spec.slots else ABSENT for spec in (first, second)]
        if ABSENT in sides:
            rows.append((slot, *sides))
    one_sided = tuple(f"{row[0]}." for row in rows)
    before, after = (_flat(spec) for spec in (first, second))
    for key in dict.fromkeys([*before, *after]):
        values = before.get(key, ABSENT), after.get(key, ABSENT)
        if values[0] != values[1] and not key.startswith(one_sided):
            rows.append((key, *(value if value is ABSENT else as_yaml(value) for value in values)))
    return rows


def _flat(spec: ModelSpec) -> dict[str, Any]:
    data = spec.to_dict()
    del data["name"]
    card = data.pop("card") or {}
    about = {name: card[name] for name in ("family", "context") if name in card}
    kinds = {name: in_words(said(kind)) for name, kind in spec.kinds.items()}
    return flat({**about, **data, "kinds": kinds})


def _costs(specs: Sequence[ModelSpec], asked: int | None) -> list[tuple[str, ...]]:
    seq_len = seq_len_for(specs, asked)
    params, flops = [spec.params() for spec in specs], [spec.flops(seq_len) for spec in specs]
    rows = [
        ("parameters", [float(count.total) for count in params]),
        ("active", [float(count.active) for count in params]),
        (f"FLOPs per token, {seq_len:,} tokens", [count.total for count in flops]),
    ]
    return [(what, *(short_count(value) for value in values), f"{values[1] / values[0]:.3g}") for what, values in rows]
