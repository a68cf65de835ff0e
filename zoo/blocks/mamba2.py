"""Mamba-2 as a sequence mixer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.autocast import without_autocast
from zoo.blocks.base import Context, Linear, Mixer
from zoo.blocks.compiled_mixers import CompiledGatedNorm, fits
from zoo.blocks.conv import CausalConv, ConvState, zero_padding
from zoo.blocks.ssd import ssd, ssd_step
from zoo.spec.mamba2 import Mamba2Spec


class MambaState:
    """What a state-space mixer remembers: its state, fp32 at least, and the last inputs of the convolution."""

    def __init__(self, memory: Tensor, conv: ConvState) -> None:
        self.memory = memory
        """[b, ...]."""
        self.conv = conv

    def select(self, rows: Tensor) -> None:
        """Keep the rows of the batch that `rows` [b'] int64 names, in that order."""
        self.memory = self.memory[rows]
        self.conv.select(rows)


class Mamba2(Mixer):
    """Mamba-2 (arXiv:2405.21060) with every option of `Mamba2Spec`.

    `Mamba2(512, num_heads=16)(x)` maps x [b, s, 512] to the same shape.
    """

    describes = Mamba2Spec
    spec: Mamba2Spec

    def __init__(self, d_model: int, spec: Mamba2Spec | None = None, **options: Any) -> None:
        super().__init__(d_model, spec, **options)
        spec = self.spec
        shared_width = spec.num_groups * spec.d_state
        self.z = Linear(d_model, spec.d_inner, spec.bias)
        self.x = Linear(d_model, spec.d_inner, spec.bias)
        self.b = Linear(d_model, shared_width, spec.bias)
        self.c = Linear(d_model, shared_width, spec.bias)
        self.dt = Linear(d_model, spec.num_heads, spec.bias)
        self.conv = CausalConv(spec.d_conv, spec.conv_width, spec.conv_bias)
        self.a_log = nn.Parameter(torch.empty(spec.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(spec.num_heads))
        self.skip = nn.Parameter(torch.empty(spec.num_heads))
        self.norm = GatedNorm(spec, self.norm_spec.eps)
        self.out = Linear(spec.d_inner, d_model, spec.bias, writes_residual=True)

    def forward(self, x: Tensor, context: Context | None = None, state: MambaState | None = None) -> Tensor:
        """x [b, s, d_model]; the result has its shape. `state` comes from `new_state`, is continued without gradients.

        Raises:
            ValueError: documents together with a state.
        """
        context = context or Context.of(x)
        z, dt = self.z(x), self.dt(x)
        xbc = self.conv(torch.cat((self.x(x), self.b(x), self.c(x)), -1), context, state and state.conv)
        with without_autocast(x.device):
            y = self._scan(xbc, self._step_sizes(dt), context, state)
            y = self.norm(y.flatten(-2), z).to(xbc.dtype)
        return self.out(y)

    def new_state(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> MambaState:
        spec, wide = self.spec, torch.promote_types(dtype, torch.float32)
        memory = torch.zeros(batch_size, spec.num_heads, spec.head_dim, spec.d_state, device=device, dtype=wide)
        return MambaState(memory, self.conv.new_state(batch_size, device, dtype))

    def init_weights(self, std: float, out_std: float) -> None:
        """-a uniform in [1, 16], steps log-uniform in [0.001, 0.1], skip 1: as released models were started."""
        nn.init.uniform_(self.a_log, 1, 16)
        with torch.no_grad():
            self.a_log.log_()
        start_steps(self.dt_bias)
        nn.init.ones_(self.skip)

    def _step_sizes(self, dt: Tensor) -> Tensor:
        """[b, s, h], fp32 at least."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        bounded = self.spec.dt_min is not None or self.spec.dt_max is not None
        return dt.clamp(self.spec.dt_min, self.spec.dt_max) if bounded else dt

    def _scan(self, xbc: Tensor, dt: Tensor, context: Context, state: MambaState | None) -> Tensor:
        """The state-space model over x, b and c side by side: [b, s, h, p] in the dtype of dt."""
        spec = self.spec
        shared_width = spec.num_groups * spec.d_state
        x, b, c = xbc.split((spec.d_inner, shared_width, shared_width), -1)
        # The convolution's bias reaches padding; an input of zero leaves the state at zero.
        x = zero_padding(x.unflatten(-1, (spec.num_heads, -1)), context)
        b, c = (part.unflatten(-1, (spec.num_groups, -1)) for part in (b, c))
        a = -self.a_log.to(dt.dtype).exp()
        if state is not None and x.shape[1] == 1:
            y = ssd_step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state.memory)[:, None]
        else:
            start = None if state is None else state.memory
            y, end = self.recur(x, dt, a, b, c, start, context.documents)
            if state is not None:
                state.memory = end.detach()
        return y + x * self.skip.to(dt.dtype)[:, None]

    def recur(
        self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence over many tokens, as `zoo.blocks.ssd.ssd` does it."""
        return ssd(x, dt, a, b, c, self.spec.chunk_size, start, documents)


def start_steps(dt_bias: Tensor) -> None:
    """Fill `dt_bias` so that softplus of it is log-uniform in [0.001, 0.1]."""
    nn.init.uniform_(dt_bias, math.log(1e-3), math.log(1e-1))
    with torch.no_grad():
        step = dt_bias.exp()
        dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


class GatedNorm(nn.Module):
    """RMS norm over groups of channels, with silu of a gate before it or after it."""

    def __init__(self, spec: Mamba2Spec, eps: float) -> None:
        super().__init__()
        self.eps, self.before_gate = eps, spec.norm_before_gate
        self.num_spans = spec.num_groups if spec.norm_span == "group" else 1
        self.weight = nn.Parameter(torch.empty(spec.d_inner))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate [..., d_inner]; the result has the shape and dtype of x. Norm and gate are computed in fp32."""
        if fits(x, gate, self.weight):
            parts = (part.unflatten(-1, (self.num_spans, -1)) for part in (x, gate))
            found: Tensor = CompiledGatedNorm.apply(*parts, self.weight, self.eps, False, self.before_gate)
            return found.flatten(-2)
        opening = F.silu(gate.to(torch.float32))
        y = x.to(torch.float32)
        y = y if self.before_gate else y * opening
        y = y.unflatten(-1, (self.num_spans, -1))
        y = F.rms_norm(y, y.shape[-1:], None, self.eps).flatten(-2)
        y = y.to(x.dtype) * self.weight.to(x.dtype)
        return y * opening.to(x.dtype) if self.before_gate else y

    def init_weights(self, std: float, out_std: float) -> None:
        nn.init.ones_(self.weight)
