"""Routed experts: many MLPs with stacked weights, each applied to the tokens that are sent to it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks import compiled
from zoo.blocks.activation import activate
from zoo.blocks.autocast import autocast_dtype
from zoo.blocks.dispatch import Dispatch, combine, gather
from zoo.blocks.few import few_experts, is_few
from zoo.blocks.grouped import ExpertWeights, grouped_experts, split_hidden
from zoo.spec.base import ConfigError, decode
from zoo.spec.mlp import ActivationSpec

Backend = Literal["auto", "loop", "grouped", "grouped_mm", "compiled"]
BACKENDS: tuple[str, ...] = get_args(Backend)


class Experts(nn.Module):
    """Stacked MLPs of equal shape.

    `Experts(512, num_experts=8, d_expert=256)(x, weights, indices)` maps x [t, 512] to the same shape.

    Parameters: `gate_up` [e, 2f, d], the gate's rows above the up rows, or `up` [e, f, d] ungated; `down` [e, d, f];
    with `bias`: `gate_up_bias` or `up_bias`, and `down_bias`.
    """

    down: nn.Parameter
    backend: Backend
    """How the arithmetic is done; the results agree. `loop`: expert by expert in plain torch, the reference. `grouped`:
    one autograd function (`zoo.blocks.grouped`). `grouped_mm`: torch's kernel; it does not wait for the device and
    costs no Python per expert, but takes no fp64. `compiled`: a kernel of our own for gated silu experts in fp32 on a
    CPU (`zoo.blocks.compiled`). `auto`: the fastest that fits; `compiled`, and what a few tokens take instead without
    gradients (`zoo.blocks.few`), only once the kernels are loaded, which `zoo.tuning.tune` does."""

    def __init__(
        self,
        d_in: int,
        num_experts: int,
        d_expert: int,
        spec: ActivationSpec | None = None,
        *,
        writes_residual: bool = True,
        backend: Backend = "auto",
        recompute: bool = False,
        **options: Any,
    ) -> None:
        """
        Args:
            d_in: width of inputs and outputs.
            d_expert: width of the activations of one expert.
            spec: the activation, and whether there are gates and biases; or give its fields as `options`.
            writes_residual: whether `down` is the last matrix of its branch, for its smaller start.
            recompute: keep less for the backward pass (`grouped` and `compiled` only).
        """
        super().__init__()
        self.spec = decode(ActivationSpec, options, "Experts") if spec is None else spec
        self.writes_residual, self.backend, self.recompute = writes_residual, backend, recompute
        first, width = ("gate_up", 2 * d_expert) if self.spec.gated else ("up", d_expert)
        self._first = first
        shapes: dict[str, tuple[int, ...]] = {first: (width, d_in), "down": (d_in, d_expert)}
        if self.spec.bias:
            shapes |= {f"{first}_bias": (width,), "down_bias": (d_in,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_experts, *shape)))
        self.init_weights(std=0.02, out_std=0.02)

    def init_weights(self, std: float, out_std: float) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=out_std if name == "down" and self.writes_residual else std)

    @property
    def stacked(self) -> ExpertWeights:
        """All parameters, whatever they are named."""
        names = (self._first, "down", f"{self._first}_bias", "down_bias")
        return ExpertWeights(*(getattr(self, name, None) for name in names))  # type: ignore[arg-type]

    def forward(self, x: Tensor, weights: Tensor | None, indices: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        Args:
            x: [t, d].
            weights: [t, c], the factor on each chosen expert's output; None: 1.
            indices: [t, c] int64, the chosen experts.

        Returns:
            [t, d] in the dtype of x, or in autocast's.
        """
        x = x.to(autocast_dtype(x))
        if self.backend == "auto" and is_few(x, self.stacked):
            return few_experts(x, weights, indices, self.stacked, self.spec)
        match self.backend_for(x, indices.numel()):
            case "loop":
                return loop_experts(x, weights, indices, self.stacked, self.spec)
            case "grouped_mm":
                return grouped_mm_experts(x, weights, indices, self.stacked, self.spec)
            case "compiled":
                return self._compiled(x, weights, indices)
            case _:
                return grouped_experts(x, weights, indices, self.stacked, self.spec, self.recompute)

    def _compiled(self, x: Tensor, weights: Tensor | None, indices: Tensor) -> Tensor:
        stacked, found = self.stacked, None
        if self.backend == "auto" and torch.is_grad_enabled():
            found = compiled.Sorted.of(indices, len(self.down))
            if not found.is_even():
                return grouped_experts(x, weights, indices, stacked, self.spec, self.recompute)
        return compiled.compiled_experts(x, weights, indices, stacked, self.spec, self.recompute, found)

    def backend_for(self, x: Tensor, num_rows: int) -> str:
        """The backend that takes `num_rows` rows of x [t, d].

        Raises:
            ConfigError: `backend` names none.
        """
        if self.backend not in BACKENDS:
            raise ConfigError(f"experts: found {self.backend!r}; allowed: {', '.join(BACKENDS)}")
        if x.is_meta:
            return "grouped"
        if self.backend != "auto":
            return self.backend
        if compiled.is_ready() and compiled.fits(x, self.stacked, self.spec):
            return "compiled"
        stack = self.down
        # What torch's kernel takes: these dtypes, and rows that are whole multiples of 16 bytes.
        fits = x.dtype in _KERNEL_DTYPES and all(width * x.itemsize % 16 == 0 for width in stack.shape[1:])
        if x.device.type == "cpu":
            # Casting the whole stack would cost more than it saves; with many rows, the products themselves do.
            fits = fits and stack.dtype == x.dtype and num_rows < 32 * len(stack)
        return "grouped_mm" if fits else "grouped"


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def loop_experts(
    x: Tensor, scale: Tensor | None, indices: Tensor, weights: ExpertWeights, spec: ActivationSpec
) -> Tensor:
    """The reference: one expert after the other. Arguments and result as in `Experts.forward`."""
    wide = x.dtype if scale is None else torch.promote_types(x.dtype, scale.dtype)
    result = torch.zeros_like(x, dtype=wide)
    for expert, mine in enumerate(weights.each(x.dtype)):
        token, choice = torch.where(indices == expert)
        hidden = F.linear(x[token], mine.first, mine.first_bias)
        output = F.linear(activate(spec, *split_hidden(spec, hidden)), mine.down, mine.down_bias)
        if scale is not None:
            output = output * scale[token, choice, None]
        result = result.index_add(0, token, output.to(wide))
    return result.to(x.dtype)


def grouped_mm_experts(
    x: Tensor, scale: Tensor | None, indices: Tensor, weights: ExpertWeights, spec: ActivationSpec
) -> Tensor:
    """By torch's grouped matrix product. Arguments and result as in `Experts.forward`; fp64 is refused by torch."""
    dispatch = Dispatch.of(indices, len(weights.first))
    experts = indices.flatten()[dispatch.order]

    def product(rows: Tensor, stack: Tensor, bias: Tensor | None) -> Tensor:
        result = F.grouped_mm(rows, stack.to(rows.dtype).mT, offs=dispatch.ends)
        # In fp32, because the gradient of a bias is a sum over all rows of its expert.
        return result if bias is None else result + bias.to(torch.float32)[experts].to(rows.dtype)

    hidden = product(gather(x, dispatch), weights.first, weights.first_bias)
    output = product(activate(spec, *split_hidden(spec, hidden)), weights.down, weights.down_bias)
    return combine(output, scale, dispatch)
