"""An exponential moving average of the weights, which often predicts better than the weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn, optim

PREFIX, AVERAGE = "ema/", "average"


class Ema(optim.Optimizer):
    """Averages weights after each step: average = decay * average + (1 - decay) * weight, in fp32 at least.

    It is an optimizer that changes nothing, so that checkpoints, shardings and resumed runs hold its state as they hold
    that of any other; it comes after those that change the weights. Early on the average is over the few steps there
    were: the decay is at most (1 + steps) / (10 + steps), as in TensorFlow's ExponentialMovingAverage.

    Args:
        named: parameters with their names.
        decay: of the average's old value, per step, below 1.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        # Under names of their own: another optimizer keeps its state of the same parameter under the parameter's.
        params = [(f"{PREFIX}{name}", parameter) for name, parameter in named if parameter.requires_grad]
        super().__init__([{"params": params}], {"lr": 0.0, "peak_lr": 0.0, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take the weights as they are now into the average."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                self._take(parameter, group["decay"])
        return loss

    def _take(self, parameter: Tensor, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state[AVERAGE] = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            state["step"] = torch.tensor(0.0)
        steps = float(state["step"])
        state[AVERAGE].lerp_(parameter.to(state[AVERAGE].dtype), 1 - min(decay, (1 + steps) / (10 + steps)))
        state["step"] += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters hold their averages inside, and their own values again afterwards."""
        held = []
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if AVERAGE in self.state.get(parameter, {}):
                        held.append((parameter, parameter.detach().clone()))
                        parameter.copy_(self.state[parameter][AVERAGE])
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, own in held:
                    parameter.copy_(own)


def average_of(optimizers: Iterable[optim.Optimizer]) -> Ema | None:
    """The average among the optimizers of a run, if it keeps one."""
    return next((optimizer for optimizer in optimizers if isinstance(optimizer, Ema)), None)
