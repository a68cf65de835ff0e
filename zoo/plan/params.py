"""Parameter counts, exact, before any tensor exists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from zoo.plan.base import Cost, Weight
from zoo.plan.trunk import EMBED, HEAD, NORMS, embedding_weights, final_weights, layer_weights, mtp_weights, slot_costs
from zoo.plan.trunk import named_weights as named_weights
from zoo.spec.model import ModelSpec


class Share(NamedTuple):
    """The parameters of one part of a model."""

    total: int
    active: int
    """What one token touches."""


@dataclass(frozen=True)
class ParamCount:
    """The trained parameters of the trunk: without MTP blocks and without buffers such as correction biases."""

    total: int
    """All of them, with both embedding tables; a tied head counts once."""
    active: int
    """What one token touches: of the routed experts, top_k; both embedding tables wholly, a tied one once."""
    embedding: int
    """The table of token embeddings."""
    by_block: Mapping[str, Share]
    """`embed`, the slots with their parts (`attention`, `moe.experts`), `norms`, `head`; the rows sum to the totals."""
    tied: bool = False
    """Whether the head is the embedding table."""
    mtp: int = 0
    """The described MTP blocks, enabled or not; no part of the counts above."""

    @property
    def active_without_lookup(self) -> int:
        """`active` less the table of token embeddings where that is only looked up: the other common convention."""
        return self.active if self.tied else self.active - self.embedding


def count_params(spec: ModelSpec) -> ParamCount:
    """Count all weights, kind by kind."""
    costs = slot_costs(spec)
    totals: Counter[str] = Counter()
    actives: Counter[str] = Counter()
    for weight, times in _trunk(spec, costs):
        totals[weight.part] += times * weight.size
        actives[weight.part] += times * weight.active
    by_block = {row: Share(totals[row], actives[row]) for row in in_order(totals)}
    mtp = sum(weight.size for weight in mtp_weights(spec, costs)) * (spec.mtp.num_blocks if spec.mtp else 0)
    embedding = spec.vocab_size * spec.d_model
    return ParamCount(totals.total(), actives.total(), embedding, by_block, spec.head.tied, mtp)


def _trunk(spec: ModelSpec, costs: Mapping[str, Cost]) -> Iterator[tuple[Weight, int]]:
    """Every different trained tensor and how often the trunk has it."""
    yield from ((weight, 1) for weight in embedding_weights(spec))
    for kind, times in Counter(spec.layer_kinds).items():
        yield from ((weight, times) for weight in layer_weights(spec, spec.kinds[kind], costs))
    yield from ((weight, 1) for weight in final_weights(spec))


def in_order(rows: Iterable[str]) -> list[str]:
    """Rows as a reader follows a token: embedding, slots in the order of the layers, norms, head."""
    ranks = {EMBED: 0, NORMS: 2, HEAD: 3}
    return sorted(rows, key=lambda row: ranks.get(row, 1))
