"""`zoo list`: the models and machines that zoo knows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from zoo.cli.console import Parser, table, write
from zoo.config import list_hardware, list_models
from zoo.config_reading import read
from zoo.spec.base import ConfigError, near
from zoo.spec.pattern import PatternError, expand

EXAMPLES = """\
  zoo list                 all models
  zoo list '*_a3b'         models whose name matches; a word without * matches anywhere
  zoo list hardware h100   machines"""
KINDS = {"models": list_models, "hardware": list_hardware}


def run(arguments: Sequence[str]) -> None:
    """Print one line a model, or one a machine."""
    parser = Parser("list", "[hardware] [PATTERN] [--json]", "List the models, or the machines.", EXAMPLES)
    parser.add_argument("what", nargs="*", metavar="PATTERN", help="of names, as in a shell")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.read(arguments)
    kind, *patterns = given.what if given.what[:1] and given.what[0] in KINDS else ["models", *given.what]
    if len(patterns) > 1:
        raise ConfigError(f"zoo list: found {' '.join(patterns)}; one pattern is enough; see 'zoo list --help'")
    names = _matching(kind, *patterns)
    facts = [(_model if kind == "models" else _machine)(name) for name in names]
    if given.json:
        print(json.dumps(facts, indent=1))
    else:
        write(_models(facts) if kind == "models" else _machines(facts))


def _matching(kind: str, pattern: str = "*") -> list[str]:
    wild = any(char in pattern for char in "*?[")
    names = KINDS[kind](pattern if wild else f"*{pattern}*")
    if not names:
        advice = near(pattern, KINDS[kind]()) or f"'zoo list {kind}' shows all"
        raise ConfigError(f"zoo list: found no {kind} like {pattern!r}; {advice}")
    return names


def _model(name: str) -> dict[str, Any]:
    said = read("model", name)
    card = said.get("card") or {}
    layers = str(said.get("layers", ""))
    try:
        counts = dict(Counter(expand(layers)))
    except PatternError:
        counts = {}
    return {
        "id": name,
        "family": card.get("family"),
        "claimed_total": card.get("claimed_total"),
        "claimed_active": card.get("claimed_active"),
        "context": card.get("context"),
        "num_layers": sum(counts.values()),
        "layers": layers,
        "kinds": counts,
        "source": card.get("source"),
    }


def _models(facts: list[dict[str, Any]]) -> Any:
    head = ("model", "family", "total", "active", "context", "layers")
    rows = [
        (
            fact["id"],
            fact["family"] or "-",
            fact["claimed_total"] or "-",
            fact["claimed_active"] or "-",
            f"{fact['context']:,}" if fact["context"] else "-",
            ", ".join(f"{count} {kind}" for kind, count in fact["kinds"].items()),
        )
        for fact in facts
    ]
    return table(head, rows, right=("total", "active", "context"), fold=("layers", "family"))


def _machine(name: str) -> dict[str, Any]:
    said = read("hardware", name, subgroups=("chip",))
    chip = said.get("chip") or {}
    return {
        "id": name,
        "chip": chip.get("name") or "",
        "num_devices": said.get("num_devices", 1),
        "memory_gib": chip.get("memory_gib"),
        "memory_gb_s": chip.get("memory_gb_s"),
        "bf16_tflops": (chip.get("tflops") or {}).get("bf16"),
        "scale_up_gb_s": (chip.get("scale_up") or {}).get("gb_s"),
        "scale_out_gbit_s": said.get("scale_out_gbit_s"),
        "announced": bool(chip.get("announced")),
    }


def _machines(facts: list[dict[str, Any]]) -> Any:
    numbers = {
        "num_devices": "devices",
        "memory_gib": "memory GiB",
        "memory_gb_s": "memory GB/s",
        "bf16_tflops": "bf16 TFLOP/s",
        "scale_up_gb_s": "link GB/s",
        "scale_out_gbit_s": "network Gbit/s",
    }
    rows = [
        (fact["id"], *(_number(fact[key]) for key in numbers), fact["chip"] + ", announced" * fact["announced"])
        for fact in facts
    ]
    return table(("hardware", *numbers.values(), "chip"), rows, right=numbers.values(), fold=("chip",))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else "-"
