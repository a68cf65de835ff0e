"""`zoo dryrun`: one training step of a model under a layout, rehearsed as one process of many."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.cli.console import Parser, write
from zoo.cli.settings import BudgetKeys, InferenceKeys, OutputKeys, PlanKeys, Settings, read_settings
from zoo.spec.base import ConfigError

EXAMPLES = """\
  zoo dryrun tiny_moe h100_8x
  zoo dryrun MODEL gb300_nvl72 hardware.num_devices=256
  zoo dryrun MODEL h100_8x hardware.num_devices=64 parallel='tp2 ep32 dp32 shard32' recompute=full json=run.json
  zoo dryrun MODEL h100_8x parallel=manual tp=2 ep=4 shard=4 skew=1.5"""
WHAT = """\
Run one training step (forward, backward, update) of the real model, really spread, as one process of many, on tensors
that hold no values: peak memory by kind, FLOPs and every collective, beside what the planner says. Needs no GPU.

keys:
  MODEL HARDWARE, seq_len= ... recompute=   as zoo plan takes them
  parallel=auto              the planner's layout; degrees that are given (tp= ...) are kept
  parallel=manual            degrees that are not given are 1, and dp is what is left
  parallel='tp2 ep8 dp8'     a layout as zoo plan writes it
  recompute=                 none, full or selective:act
  skew=                      rows at the experts of this process over the mean of all; 1 if absent
  fused=true|false           memory as fusing kernels use it, or as torch runs operation after operation
  stage=                     of a pipeline; if absent the first or the last, whichever needs more memory
  json=FILE                  for programs"""
OWN = ("parallel", "skew", "fused", "stage", "json")
DEGREES = ("tp", "pp", "vp", "cp", "ep", "etp", "dp", "shard")


def run(arguments: Sequence[str]) -> None:
    """Print a rehearsal, and write it for programs if that was asked for."""
    parser = Parser("dryrun", "MODEL [HARDWARE] [key=value ...]", WHAT, EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="MODEL", help="a model, a machine, and settings")
    own, words = _sort(parser.read(arguments).words)
    settings = read_settings(words)
    for kind in (BudgetKeys, InferenceKeys, OutputKeys):
        settings.refuse(kind, "zoo dryrun has no such key; see 'zoo dryrun --help'")
    options = settings.given(PlanKeys)
    given = {
        "skew": _number(own, "skew", 1.0, float),
        "stage": _number(own, "stage", None, int),
        "fused": _truth(own, "fused"),
    }
    path = _path(own.get("json"))
    layout = _layout(own.get("parallel", "auto"), settings, options)
    from zoo.dryrun.report import report
    from zoo.dryrun.run import dry_run

    made = dry_run(settings.model, settings.hardware, *settings.overrides, layout=layout, **given, **options)
    if path is not None:
        path.write_text(json.dumps(made.to_dict(), indent=1) + "\n", encoding="utf-8")
    write(*report(made), *(["", f"written: {path}"] if path else []))


def _sort(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The verb's own keys, and the rest."""
    own: dict[str, str] = {}
    rest = []
    for word in words:
        key, equals, value = word.partition("=")
        if key not in OWN or not equals:
            rest.append(word)
        elif key in own:
            raise ConfigError(f"{key}: is given twice; leave one of them out")
        else:
            own[key] = value
    return own, rest


def _layout(text: str, settings: Settings, options: dict[str, Any]) -> Any:
    """The layout that is named, its degrees taken out of `options`; None: the planner is to choose.

    Raises:
        ConfigError: it cannot be read, or degrees are given twice.
    """
    if text == "auto":
        return None
    from zoo.plan.layout import Layout

    if text != "manual":
        given = {name: options.pop(name) for name in DEGREES if name in options}
        if given:
            raise ConfigError(f"{next(iter(given))}: found {text!r} as parallel, which says it already; leave one out")
        parts = [re.fullmatch(r"([a-z]+)(\d+)", part) for part in text.split()]
        if not parts or any(part is None or part[1] not in DEGREES for part in parts):
            rule = "allowed: auto, manual, or degrees such as 'tp2 ep8 dp8 shard8'"
            raise ConfigError(f"parallel: found {text!r}; {rule}")
        return Layout(**{part[1]: int(part[2]) for part in parts if part})
    from zoo.plan.question import ask

    degrees = {name: options.pop(name) for name in DEGREES if name in options}
    question = ask(settings.model, settings.hardware, settings.overrides, fixed=degrees)
    devices = question.machine.num_devices
    taken = degrees.get("tp", 1) * degrees.get("pp", 1) * degrees.get("cp", 1)
    return Layout(**{"dp": devices // taken, **degrees})


def _number(own: dict[str, str], key: str, default: Any, kind: type) -> Any:
    if key not in own:
        return default
    try:
        return kind(own[key])
    except ValueError:
        raise ConfigError(f"{key}: found {own[key]!r}; must be a {'whole ' if kind is int else ''}number") from None


def _truth(own: dict[str, str], key: str) -> bool | None:
    text = own.get(key)
    if text not in (None, "true", "false"):
        raise ConfigError(f"{key}: found {text!r}; must be true or false")
    return None if text is None else text == "true"


def _path(text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text).expanduser()
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"json: found {text!r}; must be a file in a folder that exists")
    return path
