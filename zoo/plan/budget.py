"""A whole training run: days, device-hours, energy and money; and what can be trained for a given amount of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zoo.plan.checkpoints import Checkpoints, checkpoints
from zoo.spec.base import ConfigError

if TYPE_CHECKING:
    from zoo.plan.plan import Plan

DAY_S, HOUR_S = 86400.0, 3600.0
LAW_SOURCE = "arXiv:2404.10102 (a replication of Chinchilla, arXiv:2203.15556), fitted on dense models"
E0, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
"""Loss in nats a token of N parameters and D tokens: E0 + A / N ** ALPHA + B / D ** BETA."""


@dataclass(frozen=True)
class Budget:
    """What a run takes, and what the scaling law expects of it."""

    tokens: float
    days: float
    """Checkpoints included, failures not."""
    device_hours: float
    energy_mwh: float | None
    """Of the chips at their rated power, times `pue`; None where that is not known."""
    cost: float | None
    """In the currency of the price; None without a price."""
    checkpoints: Checkpoints
    flops: float
    """Model FLOPs of the run."""
    loss: float
    """Expected, in nats a token, of a dense model of the active parameters: the law knows no experts."""
    tokens_per_parameter: float
    """Active ones."""
    best_parameters: float
    """Of a dense model that the law would train with the same FLOPs."""
    best_tokens: float
    best_loss: float


def budget(
    plan: Plan,
    *,
    tokens: float | None = None,
    days: float | None = None,
    device_hours: float | None = None,
    energy_mwh: float | None = None,
    cost: float | None = None,
    price_per_device_hour: float | None = None,
    pue: float = 1.0,
    checkpoint_every: int | None = None,
    checkpoint_async: bool = False,
) -> Budget:
    """What a number of tokens takes, or how many tokens an amount of anything else is enough for.

    Args:
        tokens, days, device_hours, energy_mwh, cost: What is given; of several, the one that is used up first counts.
        price_per_device_hour: In any currency.
        pue: Power of the whole data centre over that of the chips.
        checkpoint_every: Steps between two checkpoints; absent: as many as take an hour.
        checkpoint_async: They are written while training goes on.

    Raises:
        ConfigError: nothing is given, a number is not positive, or one that is needed is missing.
    """
    given = {"tokens": tokens, "days": days, "device_hours": device_hours, "energy_mwh": energy_mwh, "cost": cost}
    for name, value in {**given, "price_per_device_hour": price_per_device_hour, "pue": pue}.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name}: found {value!r}; must be a positive number")
    if all(value is None for value in given.values()):
        raise ConfigError(f"budget: found nothing; give one of {', '.join(given)}")
    written = checkpoints(plan, every=checkpoint_every, background=checkpoint_async)
    rate, devices = plan.best.tokens_per_s / (1 + written.share), plan.best.num_devices
    watts = plan.question.machine.chip.power_w
    mw = devices * watts * pue / 1e6 if watts else None
    if energy_mwh is not None and mw is None:
        raise ConfigError("hardware.chip.power_w: a budget of energy needs it, and it is not known; give it")
    if cost is not None and price_per_device_hour is None:
        raise ConfigError("price_per_device_hour: a budget of money needs it; give it")
    hours = {
        "tokens": tokens and tokens / rate / HOUR_S,
        "days": days and days * 24,
        "device_hours": device_hours and device_hours / devices,
        "energy_mwh": energy_mwh and mw and energy_mwh / mw,
        "cost": cost and price_per_device_hour and cost / price_per_device_hour / devices,
    }
    taken = min(value for value in hours.values() if value)
    made = _of(plan, written, taken, price_per_device_hour, mw)
    return replace(made, tokens=tokens) if tokens and hours["tokens"] == taken else made


def _of(plan: Plan, written: Checkpoints, hours: float, price: float | None, mw: float | None) -> Budget:
    devices = plan.best.num_devices
    tokens = plan.best.tokens_per_s / (1 + written.share) * hours * HOUR_S
    flops = plan.best.flops.training * tokens
    active = float(plan.question.spec.params().active)
    size, data = compute_optimal(flops)
    return Budget(
        tokens=tokens,
        days=hours / 24,
        device_hours=hours * devices,
        energy_mwh=None if mw is None else mw * hours,
        cost=None if price is None else price * hours * devices,
        checkpoints=written,
        flops=flops,
        loss=loss(active, tokens),
        tokens_per_parameter=tokens / active,
        best_parameters=size,
        best_tokens=data,
        best_loss=loss(size, data),
    )


def loss(parameters: float, tokens: float) -> float:
    """Nats a token that the scaling law expects."""
    return float(E0 + A / parameters**ALPHA + B / tokens**BETA)


def compute_optimal(flops: float) -> tuple[float, float]:
    """Parameters and tokens of the lowest loss at 6 N D = `flops` (arXiv:2203.15556, equation 4)."""
    size = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** (BETA / (ALPHA + BETA))
    return float(size), float(flops / 6 / size)
