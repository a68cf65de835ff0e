"""All layouts of a model on a machine, priced: which fit, and which is the quickest.

The space is the product of the degrees of a `Layout`, the micro-batch, and what is recomputed; most of it need not be
priced. Interleaving and recomputing change a layout in known directions: the first can at best take away most of the
bubble, the second only adds time, and both bounds cost one evaluation of the plain layout. Layouts are then worked
through from the most promising bound on, until none that is left can win.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zoo.plan.engine import Engine
from zoo.plan.here import engine_for
from zoo.plan.layout import OFFLOADED, RECOMPUTED, Array, Layout, Mask, Points, recompute_parts
from zoo.plan.legal import head_counts, legal, mixtures
from zoo.plan.memory import memory_of, total
from zoo.plan.price import CONTEXT_GIB, Prices, price, storage_of
from zoo.plan.question import DEGREES, Question, divisors

Ints = NDArray[np.int64]
Table = dict[str, Ints]

MOST_MICRO_BATCH = 16
"""Sequences of a micro-batch where a model is large; kernels gain nothing from more."""
MOST_ELEMENTS = 2**28
"""Of the residual stream of a micro-batch: up to here larger ones are tried, for small models gain from them."""
LEAST_TOKENS = 512
"""Of a sequence on one device; context parallelism beyond that is not searched."""
CHUNK = 16384
"""Layouts that are priced at once: their arrays stay in the cache of a processor."""
SLACK = 1.05
"""Layouts up to this over the best are all priced, so that runners-up are known as well."""


@dataclass(frozen=True)
class Found:
    """Layouts that were priced, as columns [n], best first: those that fit by time, then those that do not."""

    question: Question
    precision: str
    table: Table
    """Degrees, `micro_batch`, and `recompute` as an index into the question's."""
    seconds: Array
    memory_gib: Array
    fits: Mask
    num_legal: int
    """Layouts of the whole space, priced or not."""

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def num_fitting(self) -> int:
        return int(np.sum(self.fits))

    def layout(self, row: int) -> Layout:
        return Layout(**{name: int(self.table[name][row]) for name in DEGREES})

    def micro_batch(self, row: int) -> int:
        return int(self.table["micro_batch"][row])

    def recompute(self, row: int) -> str:
        return self.question.recomputes[int(self.table["recompute"][row])]


def families(q: Question) -> Table:
    """Every layout without interleaving that is legal, [n] each; `shard` is nothing, a domain, or everything."""
    n, spec = q.machine.num_devices, q.spec
    heads, experts = head_counts(spec), math.gcd(*(moe.num_experts for moe in mixtures(spec)))
    every = np.array(divisors(n), dtype=np.int64)
    table: Table = {}
    table = _crossed(table, "tp", _wanted(q, "tp", [d for d in every if not heads or heads % d == 0]))
    table = _crossed(table, "pp", _wanted(q, "pp", [d for d in every if d <= spec.num_layers]))
    table = _kept(table, n % (table["tp"] * table["pp"]) == 0)
    most_cp = max(1, q.seq_len // LEAST_TOKENS)
    table = _crossed(table, "cp", _wanted(q, "cp", [d for d in every if d <= most_cp]))
    table = _kept(table, n % (table["tp"] * table["pp"] * table["cp"]) == 0)
    table["dp"] = n // (table["tp"] * table["pp"] * table["cp"])
    table = _kept(table, (table["dp"] == q.fixed["dp"]) if "dp" in q.fixed else table["dp"] > 0)
    table = _crossed(table, "micro_batch", _wanted(q, "micro_batch", micro_batches(q)))
    table = _kept(table, q.global_batch % (table["micro_batch"] * table["dp"]) == 0)
    table = _crossed(table, "ep", _wanted(q, "ep", divisors(experts) if experts else [1]))
    members = table["dp"] * table["cp"] * table["tp"]
    table = _kept(table, members % table["ep"] == 0)
    table = _crossed(table, "etp", _wanted(q, "etp", [d for d in every if d <= 8] if experts else [1]))
    table = _kept(table, (table["etp"] <= table["tp"]) | (table["etp"] == q.fixed.get("etp", 0)))
    table = _with_shards(q, table)
    table["vp"] = np.ones_like(table["tp"])
    table["recompute"] = np.zeros_like(table["tp"])
    return _kept(table, legal(spec, points_of(q, table), uneven_stages=True)) if len(table["tp"]) else table


def _wanted(q: Question, name: str, options: list[int]) -> list[int]:
    return [q.fixed[name]] if name in q.fixed else [int(option) for option in options]


def micro_batches(q: Question) -> list[int]:
    """Sizes that are tried: those that divide the global batch."""
    most = max(MOST_MICRO_BATCH, MOST_ELEMENTS // (q.seq_len * q.spec.d_model))
    return [size for size in divisors(q.global_batch) if size <= most]


def _crossed(table: Table, name: str, values: list[int]) -> Table:
    """Every row with every value."""
    length = len(next(iter(table.values()))) if table else 1
    made = {key: np.repeat(column, len(values)) for key, column in table.items()}
    made[name] = np.tile(np.array(values, dtype=np.int64), length)
    return made


def _kept(table: Table, mask: Mask | Ints) -> Table:
    return {name: column[mask] for name, column in table.items()}


def _joined(tables: list[Table]) -> Table:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _with_shards(q: Question, table: Table) -> Table:
    """Rows with weights whole, shared in a domain of fast links, and shared among all that hold the same part."""
    same = table["dp"] * table["cp"]
    if "shard" in q.fixed:
        return {**table, "shard": np.full_like(same, q.fixed["shard"])}
    inside = np.ones_like(same)
    for count, tp in np.unique(np.stack([same, table["tp"]]), axis=1).T:
        near = [d for d in divisors(int(count)) if d * tp <= q.machine.domain_size]
        inside[(same == count) & (table["tp"] == tp)] = max(near, default=1)
    whole = {**table, "shard": np.ones_like(same)}
    some = _kept({**table, "shard": inside}, (inside > 1) & (inside < same))
    all_of = _kept({**table, "shard": same}, same > 1)
    return _joined([whole, some, all_of])


def points_of(q: Question, table: Table) -> Points:
    """Rows as the cost model takes them."""
    n = len(table["tp"])
    parts = [recompute_parts(name) for name in q.recomputes]
    lookup = {part: np.array([some.get(part, 0.0) for some in parts]) for part in (*RECOMPUTED, OFFLOADED)}
    numbers = {name: table[name].astype(np.float64) for name in (*DEGREES, "micro_batch")}
    batch = {"seq_len": np.full(n, float(q.seq_len)), "global_batch": np.full(n, float(q.global_batch))}
    again = {part: values[table["recompute"]] for part, values in lookup.items() if values.any()}
    return Points(**numbers, **batch, recompute=again)


def engines_of(q: Question) -> list[tuple[Engine, bool | None]]:
    """The engines that take part, with the rows that they take: sharded, whole, or all (None)."""
    if q.engine is not None or engine_for(q.machine, True) == engine_for(q.machine, False):
        return [(q.engine_for(False), None)]
    return [(q.engine_for(False), False), (q.engine_for(True), True)]


@dataclass(frozen=True)
class Bounds:
    """Of the families of a question, [n] each."""

    seconds: Array
    """Of the plain layout."""
    memory_gib: Array
    least_seconds: Array
    """However it is interleaved."""
    least_memory_gib: Array
    """Whatever is recomputed."""


def bounds_of(q: Question, precision: str, table: Table) -> Bounds:
    """Price the plain form of every family, and bound its other forms."""
    columns: list[tuple[Array, ...]] = []
    order: list[Ints] = []
    last = len(q.recomputes) - 1
    for engine, rows in _by_engine(q, table):
        for part in np.array_split(rows, max(1, math.ceil(len(rows) / CHUNK))):
            some = _kept(table, part)
            points, run = points_of(q, some), q.run(precision, engine)
            prices = price(q.spec, q.machine, points, run, engine)
            most = np.maximum(np.floor(q.spec.num_layers / points.pp), 1.0)
            least = prices.seconds * _without_bubble(prices, most)
            again = points_of(q, {**some, "recompute": np.full_like(some["tp"], last)})
            other = memory_of(q.spec, again, storage_of(engine, run, prices.facts), mtp=run.mtp)
            small = np.minimum(total(other) + CONTEXT_GIB, prices.total_gib)
            columns.append((prices.seconds, prices.total_gib, least, small))
            order.append(part)
    back = np.argsort(np.concatenate(order), kind="stable")
    return Bounds(*(np.concatenate(column)[back] for column in zip(*columns, strict=True)))


def _without_bubble(prices: Prices, most: Array) -> Array:
    """What interleaving leaves of a step's time at best."""
    parts = prices.step.parts
    scaled = prices.seconds - parts.get("jitter", 0.0)
    return np.asarray(1.0 - parts["bubble"] * (1.0 - 1.0 / most) / scaled)


def _by_engine(q: Question, table: Table) -> Iterator[tuple[Engine, Ints]]:
    for engine, sharded in engines_of(q):
        mask = np.ones_like(table["tp"], dtype=bool) if sharded is None else (table["shard"] > 1) == sharded
        if mask.any():
            yield engine, np.flatnonzero(mask)


def interleavings(layers: int, stages: int) -> list[int]:
    """Pieces of a stage that are worth telling apart: those that make the largest piece smaller."""
    # Embedding and head may stand for a layer each; which counts are legal is for `legal` to say.
    most = (layers + 2) // stages if stages > 1 else 1
    sizes = {-(-layers // (stages * vp)): vp for vp in range(max(most, 1), 0, -1)}
    return sorted(sizes.values())


def _pieces_of(q: Question, table: Table) -> tuple[list[list[int]], Ints]:
    """Lists of interleavings, and which of them is each row's."""
    if "vp" in q.fixed:
        return [[q.fixed["vp"]]], np.zeros_like(table["pp"])
    # Fewer micro-batches than stages leave nothing to interleave.
    few = q.global_batch // (table["micro_batch"] * table["dp"]) < table["pp"]
    stages, which = np.unique(np.where(few, 1, table["pp"]), return_inverse=True)
    return [interleavings(q.spec.num_layers, int(count)) for count in stages], which


def num_expanded(q: Question, table: Table) -> int:
    """Layouts that `expanded` makes."""
    lists, which = _pieces_of(q, table)
    each = np.array([len(pieces) for pieces in lists])
    return int(each[which].sum()) * len(q.recomputes) if len(which) else 0


def expanded(q: Question, table: Table) -> Table:
    """Families with every interleaving and everything that may be recomputed, the plain form included."""
    lists, which = _pieces_of(q, table)
    each = np.array([len(pieces) for pieces in lists])[which]
    made = {name: np.repeat(column, each) for name, column in table.items() if name not in ("vp", "recompute")}
    made["vp"] = np.concatenate([np.array(lists[index], dtype=np.int64) for index in which] or [which])
    made = _crossed(made, "recompute", list(range(len(q.recomputes))))
    return _kept(made, legal(q.spec, points_of(q, made), uneven_stages=True))


def priced(q: Question, precision: str, table: Table) -> tuple[Array, Array, Mask]:
    """Seconds, GiB, and whether they fit, of every row [n]."""
    seconds, gib = np.zeros(len(table["tp"])), np.zeros(len(table["tp"]))
    for engine, rows in _by_engine(q, table):
        for part in np.array_split(rows, max(1, math.ceil(len(rows) / CHUNK))):
            points = points_of(q, _kept(table, part))
            prices = price(q.spec, q.machine, points, q.run(precision, engine), engine)
            seconds[part], gib[part] = prices.seconds, prices.total_gib
    return seconds, gib, np.asarray(gib <= q.room_gib)


def search(q: Question, precision: str | None = None, plain: Table | None = None) -> Found:
    """Find the quickest layout that fits.

    Args:
        precision: One of the question's; absent: the first.
        plain: What `families` gives for a question that differs in facts of the chip alone.

    Returns:
        What was priced; empty where no layout is legal, without a row that fits where all are too large.
    """
    precision = precision or q.precisions[0]
    table = families(q) if plain is None else plain
    if not len(table["tp"]):
        nothing = np.zeros(0)
        return Found(q, precision, table, nothing, nothing, np.zeros(0, dtype=np.bool_), 0)
    bounds = bounds_of(q, precision, table)
    room = q.room_gib
    order = np.argsort(bounds.least_seconds, kind="stable")
    order = order[bounds.least_memory_gib[order] <= room]
    pools: list[tuple[Table, Array, Array, Mask]] = []
    best, start, step = np.inf, 0, 64
    while start < len(order) and bounds.least_seconds[order[start]] <= SLACK * best:
        rows = order[start : start + step]
        rows = rows[bounds.least_seconds[rows] <= SLACK * best]
        some = expanded(q, _kept(table, rows))
        seconds, gib, fits = priced(q, precision, some)
        best = min(best, float(np.min(seconds, where=fits, initial=np.inf)))
        pools.append((some, seconds, gib, fits))
        start, step = start + step, min(4 * step, CHUNK // 4)
    # What cannot win or cannot fit is still shown, in its plain form.
    far = np.concatenate([order[start:], np.flatnonzero(bounds.least_memory_gib > room)])
    if "vp" in q.fixed:
        some = expanded(q, _kept(table, far))
        pools.append((some, *priced(q, precision, some)))
    else:
        pools.append((_kept(table, far), bounds.seconds[far], bounds.memory_gib[far], bounds.memory_gib[far] <= room))
    return _ranked(q, precision, pools, num_expanded(q, table))


def _ranked(q: Question, precision: str, pools: list[tuple[Table, Array, Array, Mask]], num_legal: int) -> Found:
    table = _joined([pool[0] for pool in pools])
    seconds, gib, fits = (np.concatenate([pool[i] for pool in pools]) for i in (1, 2, 3))
    # Where times are equal, less memory, and then fewer degrees, come first.
    degrees = sum((table[name] for name in DEGREES if name != "dp"), np.zeros(len(seconds), dtype=np.int64))
    order = np.lexsort((degrees, gib, seconds, ~fits))
    return Found(q, precision, _kept(table, order), seconds[order], gib[order], fits[order], num_legal)
