"""`zoo plan`: the best layout of a model on a machine, and why; or what running the model takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.console import Parser, write
from zoo.cli.settings import BudgetKeys, InferenceKeys, PlanKeys, Settings, jobs, read_settings
from zoo.spec.base import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zoo.plan.budget import Budget
    from zoo.plan.plan import Plan

EXAMPLES = """\
  zoo plan tiny_moe h100_8x
  zoo plan MODEL gb300_nvl72 hardware.num_devices=256 seq_len=8192 precision=mxfp8
  zoo plan MODEL h100_8x hardware.chip.memory_gib=141 sensitivity=true report=plan.html png=pictures
  zoo plan MODEL h100_8x tokens=15e12 price_per_device_hour=2.5       a whole run; or days=30, cost=1e6 ...
  zoo plan MODEL rtx4090 inference=true context=32768 batch=4
  zoo plan -m model=MODEL_A,MODEL_B hardware=h100_8x,b200_8x out=table"""
KEYS = """\
keys:
  model= hardware=         names of 'zoo list' and 'zoo list hardware'; also the first two words; hardware=auto is this
                           machine; hardware.KEY=, model.KEY= change facts, as in Hydra
  seq_len= global_batch=   tokens of a sequence, sequences of a step; precision=[bf16,fp8] chooses among several
  micro_batch= recompute= tp= pp= vp= cp= ep= etp= dp= shard=         fixed instead of searched
  engine= optimizer= mtp= routing= graphs= reserve=                   as zoo.plan takes them
  report=PAGE.html png=FOLDER sensitivity=true                        further ways to see it
  tokens= days= device_hours= energy_mwh= cost= price_per_device_hour= pue=
                           what a run takes, or what can be trained for it; checkpoint_every=STEPS checkpoint_async=true
  inference=true context= batch= precision= cache_precision=          running the model instead of training it
  out=FOLDER               with -m: where plans.csv and plans.png go"""


def run(arguments: Sequence[str]) -> None:
    """Print a plan, and write what else was asked for."""
    usage = "[-m] MODEL [HARDWARE] [key=value ...] [--json]"
    what = f"Find the best layout of a model on a machine, and explain it.\n\n{KEYS}"
    parser = Parser("plan", usage, what, EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="MODEL", help="a model, a machine, and settings")
    parser.add_argument("-m", "--multirun", action="store_true", help="every combination of comma lists, as one table")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.read(arguments)
    if given.multirun:
        from zoo.cli.plan_table import run_table

        run_table([read_settings(words) for words in jobs(given.words)], given.words)
    elif (settings := read_settings(given.words)).keys.inference:
        _inference(settings, given.json)
    else:
        _plan(settings, given.json)


def planned(settings: Settings) -> Plan:
    """The plan that settings ask for."""
    from zoo.plan.plan import plan

    settings.refuse(InferenceKeys, "it goes with inference=true")
    return plan(settings.model, settings.hardware, *settings.overrides, **settings.given(PlanKeys))


def _plan(settings: Settings, as_json: bool) -> None:
    from zoo.plan.report import report, sensitivity_report

    _check_paths(settings)
    made = planned(settings)
    run = _budget(made, settings)
    page, folder, asked = settings.keys.report, settings.keys.png, settings.keys.sensitivity
    effects = made.sensitivity() if asked or page else None
    if as_json:
        more: dict[str, Any] = {} if run is None else {"run": asdict(run)}
        if effects is not None:
            more["sensitivity"] = {effect.resource: effect.elasticity for effect in effects.effects if effect.value}
        print(json.dumps({**made.to_dict(), **more}, indent=1))
    else:
        shown = sensitivity_report(effects) if effects is not None and asked else []
        write(*report(made), *shown, *_run_report(run))
    written = _write(made, effects, run, page, folder)
    if written and not as_json:
        write("", *(f"written: {path}" for path in written))


def _write(made: Plan, effects: Any, run: Budget | None, page: str | None, folder: str | None) -> list[Path]:
    if not page and not folder:
        return []
    from zoo.plan.page import page as page_of
    from zoo.plan.page import write_page
    from zoo.plan.pictures import pictures, write_pictures
    from zoo.plan.report import sensitivity_report

    drawn, written = pictures(made, effects), []
    if page:
        sections: dict[str, list[RenderableType]] = {"The run": _run_report(run)[1:]} if run is not None else {}
        if effects is not None:
            sections["Elasticities"] = sensitivity_report(effects)[1:]
        write_page(Path(page), page_of(made, drawn, sections))
        written.append(Path(page))
    return written + (write_pictures(drawn, Path(folder)) if folder else [])


def _check_paths(settings: Settings) -> None:
    page, folder = settings.keys.report, settings.keys.png
    if settings.keys.out is not None:
        raise ConfigError(f"out: found {settings.keys.out!r}; it goes with -m; one plan is written by report= and png=")
    if page is not None and not page.endswith((".html", ".htm")):
        raise ConfigError(f"report: found {page!r}; must be the path of a web page: report=plan.html")
    if folder is not None and Path(folder).is_file():
        raise ConfigError(f"png: found the file {folder!r}; must be a folder")


def _budget(made: Plan, settings: Settings) -> Budget | None:
    asked = settings.given(BudgetKeys)
    if not asked:
        return None
    from zoo.plan.budget import budget

    return budget(made, **asked)


def _run_report(run: Budget | None) -> list[RenderableType]:
    from zoo.plan.report import budget_report

    return [] if run is None else budget_report(run)


def _inference(settings: Settings, as_json: bool) -> None:
    from zoo.plan.inference import inference
    from zoo.plan.report import inference_report

    why = "it is a setting of training; leave it or inference=true out"
    settings.refuse(PlanKeys, why, but=("precision",))
    settings.refuse(BudgetKeys, why)
    options = {**settings.given(InferenceKeys), "precision": settings.keys.precision}
    found = inference(settings.model, settings.hardware, *settings.overrides, **options)
    if as_json:
        speeds = {name: getattr(found, name) for name in ("total_gib", "fits", "decode_tokens_per_s")}
        print(json.dumps({**asdict(found), **speeds}, indent=1))
    else:
        write(*inference_report(found))
