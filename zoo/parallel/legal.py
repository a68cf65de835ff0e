"""Which layouts a model can be spread by here, and why not by others."""

from __future__ import annotations

from torch import Tensor

from zoo.blocks.base import Context
from zoo.decoder import Decoder
from zoo.plan.layout import Layout, Points
from zoo.plan.legal import check as check_plan
from zoo.spec.base import ConfigError


def check(model: Decoder, layout: Layout) -> None:
    """Refuse what the planner refuses, and what cannot be run yet.

    Raises:
        ConfigError: one line for each reason.
    """
    points = Points.of([layout], seq_len=2 * layout.cp, global_batch=layout.dp)
    check_plan(model.spec, points, uneven_stages=True)
    if layout.etp > 1 and not model.moe_layers():
        raise ConfigError(f"layout.etp: found {layout.etp}; the model has no experts: set it to 1")


def check_rows(tokens: Tensor, context: Context, layout: Layout) -> None:
    """Refuse rows [b, s] that cannot be cut along tp and cp.

    Raises:
        ConfigError: their length does not go with it, or they have padding.
    """
    tp, cp = layout.tp, layout.cp
    if cp > 1 and tokens.shape[1] % (2 * cp):
        raise ConfigError(f"train.seq_len: found {tokens.shape[1]}; twice layout.cp, {2 * cp}, must divide it")
    if tokens.shape[1] % (tp * cp):
        product = f"layout.tp, {tp}," if cp == 1 else f"layout.tp * layout.cp, {tp * cp},"
        raise ConfigError(f"train.seq_len: found {tokens.shape[1]}; {product} must divide it")
    for name, degree in (("tp", tp), ("cp", cp)):
        if degree > 1 and context.padding is not None:
            raise ConfigError(
                f"layout.{name}: found {degree}; rows with padding are not cut: set it to 1, or pack the rows"
            )
