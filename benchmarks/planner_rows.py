"""The published runs that the planner is fitted on and judged by, and the models and machines that they name."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import zoo
from zoo.config import compose
from zoo.plan.layout import Layout
from zoo.spec.base import decode
from zoo.spec.composed import plain
from zoo.spec.hardware import HardwareSpec
from zoo.spec.model import ModelSpec

DATA = Path(__file__).parent / "data"
ROWS, MODELS = DATA / "planner_rows.csv", DATA / "planner_models.json"


@dataclass(frozen=True)
class Run:
    """One published run."""

    row_id: str
    model: str
    hardware: str
    domain: int
    """Devices of a fast domain where it is not the machine's usual; 0: as usual."""
    network_gbit_s: int
    """Of a device where it is not the machine's usual; 0: as usual."""
    seq_len: int
    global_batch: int
    micro_batch: int
    precision: str
    tp: int
    pp: int
    vp: int
    cp: int
    ep: int
    etp: int
    dp: int
    shard: int
    recompute: str
    graphs: int
    """As `zoo.plan.step.step_of` takes them."""
    engine: str
    epoch: str
    mtp: int
    balanced: int
    tokens_per_s: float
    """On one device."""
    memory_gb: float
    """Published peak; 0: none."""
    source: str

    @property
    def layout(self) -> Layout:
        return Layout(self.tp, self.pp, self.vp, self.cp, self.ep, self.etp, self.dp, self.shard)

    @property
    def series(self) -> tuple[Any, ...]:
        """Runs that differ in layout only have this in common."""
        return (
            self.model,
            self.hardware,
            self.layout.num_devices,
            self.precision,
            self.seq_len,
            self.global_batch,
            self.epoch,
            self.source,
        )


def runs() -> list[Run]:
    """All runs of the data file."""
    with ROWS.open(encoding="utf-8", newline="") as file:
        kinds = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(Run)}
        return [Run(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


FAMILIES = ("bloom", "mpt", "llama4", "llama", "gpt-oss", "gpt", "grok", "deepseek", "moonlight", "qwen")
FAMILIES += ("nemotron-3", "nemotron", "gemma")
"""The first that is found in a model's name."""
SAME = {"moonlight": "deepseek"}


def family(model: str) -> str:
    """Models of one design: sizes, proxies and prototypes together."""
    found = next((name for name in FAMILIES if name in model.lower()), model)
    return SAME.get(found, found)


@cache
def described() -> dict[str, Any]:
    return json.loads(MODELS.read_text(encoding="utf-8"))


@cache
def model_of(name: str) -> ModelSpec | None:
    """The description of a published model: the zoo's own where there is one; None if nothing describes it.

    A prototype that was tried with several numbers of heads and widths says which behind an @: `NAME@14336x72x64`.
    """
    base, _, shape = name.partition("@")
    entry = described().get(base)
    if entry is None:
        return None
    if "model" in entry:
        return decode(ModelSpec, {"name": base, **(reshaped(entry["model"], shape) if shape else entry["model"])}, name)
    if entry["zoo"] in zoo.list_models():
        spec = zoo.load(entry["zoo"])
    else:
        by_hand = described().get("@" + entry["zoo"])
        spec = decode(ModelSpec, by_hand["model"], name) if by_hand else None
    return spec and spec.replace(layers=entry["layers"]) if "layers" in entry else spec


def reshaped(model: dict[str, Any], shape: str) -> dict[str, Any]:
    """A dense model with another width, number of layers and number of heads."""
    width, layers, heads = (int(number) for number in shape.split("x"))
    changed = {**model, "d_model": width, "layers": f"{layers}*dense", "mlp": {**model["mlp"], "d_ffn": 4 * width}}
    return {**changed, "attention": {**model["attention"], "num_heads": heads, "num_kv_heads": heads}}


@cache
def machine(name: str) -> HardwareSpec:
    """A hardware profile by name."""
    return decode(HardwareSpec, plain(compose([f"hardware={name}"]))["hardware"], "hardware")
