"""What a whole model is made of: its trained tensors, each with the row of a table that it counts in.

The names are those of the built module's parameters. The trunk is the model without its MTP blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from zoo.plan.base import Cost, Weight, cost_of, linear
from zoo.plan.norm import norm_weights
from zoo.spec.model import KindSpec, ModelSpec
from zoo.spec.pattern import expand

EMBED, NORMS, HEAD = "embed", "norms", "head"
"""The rows beside those of the slots."""


def slot_costs(spec: ModelSpec) -> dict[str, Cost]:
    """The cost of every described block by the name of its slot."""
    return {slot: cost_of(block, spec.d_model, spec.norm) for slot, block in spec.slots.items()}


def row_name(slot: str, part: str) -> str:
    """The row of a part of a slot: `attention`, `moe.experts`."""
    return f"{slot}.{part}" if part else slot


def embedding_weights(spec: ModelSpec) -> list[Weight]:
    """The token table and, if there is one, the table of positions; both are looked up, not multiplied with."""
    weights = [Weight("embed.weight", (spec.vocab_size, spec.d_model), part=EMBED)]
    if spec.embedding.positions:
        weights.append(Weight("embed.positions", (spec.embedding.positions, spec.d_model), part=EMBED))
    return weights


def layer_weights(spec: ModelSpec, kind: KindSpec, costs: Mapping[str, Cost]) -> list[Weight]:
    """The weights of one layer of a kind, named below the layer; `part` is the whole name of the row."""
    branches = (
        ("mixer", kind.mixer, spec.placement_of(kind)),
        ("ffn", kind.ffn, spec.ffn_placement_of(kind)),
        ("beside", kind.beside, "pre"),
    )
    weights: list[Weight] = []
    for branch, slot, placement in branches:
        if slot is None:
            continue
        if placement != "post":
            weights += norm_weights(f"{branch}_norm", spec.d_model, spec.norm, NORMS)
        weights += [weight.under(branch, row_name(slot, weight.part)) for weight in costs[slot].weights()]
        if placement != "pre":
            weights += norm_weights(f"{branch}_post_norm", spec.d_model, spec.norm, NORMS)
    return weights


def final_weights(spec: ModelSpec) -> list[Weight]:
    """The last norm and the head. A tied head has no matrix of its own: the embedding's is counted there."""
    weights = norm_weights("norm", spec.d_model, spec.norm, NORMS)
    if not spec.head.tied:
        weights.append(Weight("head.weight", (spec.vocab_size, spec.d_model), product=True, part=HEAD))
    if spec.head.bias:
        weights.append(Weight("head.bias", (spec.vocab_size,), part=HEAD))
    return weights


def mtp_weights(spec: ModelSpec, costs: Mapping[str, Cost]) -> list[Weight]:
    """The weights of one block of multi-token prediction, named below it; none if the model describes no such block."""
    if spec.mtp is None:
        return []
    norms = [norm_weights(name, spec.d_model, spec.norm, NORMS) for name in ("embed_norm", "hidden_norm", "norm")]
    weights = [weight for norm in norms for weight in norm] + linear("proj", 2 * spec.d_model, spec.d_model)
    for index, kind in enumerate(expand(spec.mtp.layers)):
        weights += [weight.under(f"layers.{index}") for weight in layer_weights(spec, spec.kinds[kind], costs)]
    return weights


def named_weights(spec: ModelSpec) -> Iterator[Weight]:
    """Every trained tensor under the name of the built module's parameter, one by one: those of the trunk, and of the
    MTP blocks if they are enabled."""
    costs = slot_costs(spec)
    kinds = {name: layer_weights(spec, spec.kinds[name], costs) for name in set(spec.layer_kinds)}
    yield from embedding_weights(spec)
    for index, kind in enumerate(spec.layer_kinds):
        yield from (weight.under(f"layers.{index}") for weight in kinds[kind])
    yield from final_weights(spec)
    if spec.mtp is not None and spec.mtp.enabled:
        block = mtp_weights(spec, costs)
        for index in range(spec.mtp.num_blocks):
            yield from (weight.under(f"mtp.{index}") for weight in block)
