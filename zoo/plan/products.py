"""The matrix products of a model's blocks, how they are cut among devices, and the parameters that follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from zoo.plan.base import Cost, Weight
from zoo.plan.layout import Array, Points
from zoo.plan.trunk import slot_costs
from zoo.spec.model import ModelSpec
from zoo.spec.pattern import expand

Split = Literal["columns", "rows", "none"]

_ROWS = ("out", "down")
_WHOLE = ("q_down", "kv_down", "k_shared", "router", "shared_gate", "latent_down", "latent_up", "indexer", "proj")
"""Weights that tensor parallelism leaves whole: narrow ones whose outputs every device needs."""


@dataclass(frozen=True)
class Product:
    """A matrix product of a block with a weight [n, k], or with `stack` of them of which a token meets `share`."""

    name: str
    n: int
    k: int
    split: Split
    stack: int = 1
    top_k: float = 1.0

    @property
    def grouped(self) -> bool:
        return self.stack > 1


@dataclass(frozen=True)
class Use:
    """A slot and how many layers of the model have it; those of multi-token prediction are counted in."""

    slot: str
    cost: Cost
    times: float
    is_mixer: bool
    products: tuple[Product, ...]
    experts: int
    """Routed experts; 0: none."""
    top_k: float


def split_of(name: str) -> Split:
    """How tensor parallelism cuts a weight, by its name below the block."""
    words = name.split(".")
    if any(word in _WHOLE for word in words):
        return "none"
    return "rows" if any(word in _ROWS for word in words) else "columns"


def products_of(weights: Iterable[Weight], d_model: int) -> tuple[Product, ...]:
    """The matrix products of a block; those of one input that are cut alike are done as one, as engines fuse them."""
    found: dict[tuple[str, int, Split, int], Product] = {}
    for weight in weights:
        if not weight.product:
            continue
        n, k = weight.shape[-2:] if len(weight.shape) > 1 else (1, weight.shape[0])
        stack = weight.shape[0] if len(weight.shape) == 3 else 1
        split, top_k = split_of(weight.name), float(weight.share * stack)
        key = (weight.part, k, split, stack)
        if k == d_model and key in found and split != "rows":
            n += found[key].n
        elif key in found:
            key = (f"{weight.part}/{weight.name}", k, split, stack)
        found[key] = Product(weight.name, n, k, split, stack, top_k)
    return tuple(found.values())


def uses_of(spec: ModelSpec, mtp: bool) -> list[Use]:
    """The slots of a model."""
    kinds = list(spec.layer_kinds)
    if mtp and spec.mtp is not None:
        kinds += list(expand(spec.mtp.layers)) * spec.mtp.depth
    described = [spec.kinds[kind] for kind in kinds]
    mixers = Counter(kind.mixer for kind in described if kind.mixer)
    ffns = Counter(slot for kind in described for slot in (kind.ffn, kind.beside) if slot)
    costs, uses = slot_costs(spec), []
    for slot, times in (*mixers.items(), *ffns.items()):
        products = products_of(costs[slot].weights(), spec.d_model)
        stacked = [product for product in products if product.grouped]
        experts, top_k = (stacked[0].stack, stacked[0].top_k) if stacked else (0, 0.0)
        uses.append(Use(slot, costs[slot], float(times), slot in mixers, products, experts, top_k))
    return uses


@dataclass(frozen=True)
class Sizes:
    """Trained parameters of a model by how they are shared among devices."""

    cut: float
    """By tensor parallelism."""
    whole: float
    experts: float
    embed: float
    head: float


def sizes_of(spec: ModelSpec, mtp: bool) -> Sizes:
    """All of a model's parameters, the MTP blocks included if they are trained."""
    cut = whole = experts = 0.0
    for use in uses_of(spec, mtp):
        for weight in use.cost.weights():
            if len(weight.shape) == 3 and weight.product:
                experts += use.times * weight.size
            elif split_of(weight.name) == "none" or len(weight.shape) < 2:
                whole += use.times * weight.size
            else:
                cut += use.times * weight.size
    table = float(spec.vocab_size * spec.d_model)
    return Sizes(cut, whole, experts, table, 0.0 if spec.head.tied else table)


def weights_on(spec: ModelSpec, p: Points, mtp: bool) -> tuple[Array, Array, Array]:
    """Parameters on one device of the fullest stage: all, those it has gradients of, and those it optimizes [n]."""
    sizes = sizes_of(spec, mtp)
    table = np.where(p.pp > 1, max(sizes.embed, sizes.head), sizes.embed + sizes.head) / p.tp
    dense = (sizes.cut / p.tp + sizes.whole) / p.pp + table
    experts = sizes.experts / (p.ep * p.etp * p.pp)
    optimized = dense / (p.dp * p.cp) + experts / np.maximum(p.expert_dp, 1.0)
    return dense + experts, dense / p.shard + experts / p.expert_shard, optimized
