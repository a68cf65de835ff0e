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
    check_plan(model.spec, Points.of([layout], seq_len=2 * layout.cp, global_batch=layout.dp))
    lines = []
    if layout.pp > 1:
        lines.append(f"layout.pp: found {layout.pp}; pipelines cannot be run yet: set it to 1")
    if layout.cp > 1:
        lines.append(f"layout.cp: found {layout.cp}; sequences are not cut among processes yet: set it to 1")
    if layout.etp > 1 and not model.moe_layers():
        lines.append(f"layout.etp: found {layout.etp}; the model has no experts: set it to 1")
    if lines:
        raise ConfigError("\n".join(lines))


def check_rows(tokens: Tensor, context: Context, layout: Layout) -> None:
    """Refuse rows [b, s] that cannot be cut along tp.

    Raises:
        ConfigError: their length does not go with it, or they have padding.
    """
    if layout.tp == 1:
        return
    if tokens.shape[1] % layout.tp:
        raise ConfigError(f"train.seq_len: found {tokens.shape[1]}; layout.tp, {layout.tp}, must divide it")
    if context.padding is not None:
        raise ConfigError(f"layout.tp: found {layout.tp}; rows with padding are not cut: set it to 1, or pack the rows")
