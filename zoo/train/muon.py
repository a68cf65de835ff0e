"""Muon: momentum, orthogonalised matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (https://kellerjordan.github.io/posts/muon): steep at 0, so that small values grow fast."""


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Push the singular values of each matrix to near 1 (0.7 to 1.2 after 5 steps), keeping its singular vectors.

    Args:
        matrices: [..., rows, columns], floating point. Leading dimensions are a batch.
        steps: Newton-Schulz iterations.

    Returns:
        The same shape and dtype. Computed in bf16 on GPUs, where it is fast and enough, and at least in fp32 elsewhere.
    """
    a, b, c = COEFFICIENTS
    wide = torch.promote_types(matrices.dtype, torch.float32)
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else wide)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def matched_scale(rows: int, columns: int) -> float:
    """Factor that gives an orthogonalised update the RMS of a usual AdamW update (arXiv:2502.16982, equation 4)."""
    return 0.2 * max(rows, columns) ** 0.5


def whole_matrices(stack: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The matrices of [..., rows, columns] of which this process holds a part, whole; and the way back for a result.

    Of matrices that several processes share, each of them gets all; a stack that is divided between its matrices stays
    so.
    """
    if not hasattr(stack, "placements"):
        return stack, lambda result: result
    from torch.distributed.tensor import DTensor, Replicate  # takes a second to import

    assert isinstance(stack, DTensor)
    mesh, parts = stack.device_mesh, stack.placements
    apart = stack.ndim > 2
    whole = [place if apart and getattr(place, "dim", None) == 0 else Replicate() for place in parts]
    gathered = stack.redistribute(placements=whole)

    def scatter(result: Tensor) -> Tensor:
        size, stride = stack.shape, stack.stride()
        spread = DTensor.from_local(result, mesh, whole, run_check=False, shape=size, stride=stride)
        return spread.redistribute(placements=parts)

    return gathered.to_local(), scatter


class Muon(torch.optim.Optimizer):
    """Muon for matrices [rows, columns] and stacks of them [..., rows, columns].

    Args:
        params: parameter groups. A group's `num_parts` says how many matrices are concatenated along the rows of each
            parameter of the group; every part is orthogonalised on its own.
        lr: learning rate, comparable to AdamW's.
        momentum: decay rate of the gradient's running sum.
        nesterov: look one step ahead along the momentum.
        ns_steps: Newton-Schulz iterations.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.1,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "weight_decay": weight_decay,
            "num_parts": 1,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(grad)
        direction = grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        matrices, scatter = whole_matrices(direction)
        parts = matrices.unflatten(-2, (group["num_parts"], -1))
        update = scatter(orthogonalize(parts, group["ns_steps"]).flatten(-3, -2))
        scale = matched_scale(parts.shape[-2], parts.shape[-1])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)
