"""Mamba-1 as a sequence mixer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.autocast import without_autocast
from zoo.blocks.base import Context, Linear, Mixer
from zoo.blocks.conv import CausalConv, zero_padding
from zoo.blocks.mamba2 import MambaState, start_steps
from zoo.blocks.norm import Norm
from zoo.blocks.selective_scan import selective_scan, selective_step
from zoo.spec.mamba1 import Mamba1Spec


class Mamba1(Mixer):
    """Mamba-1 (arXiv:2312.00752) with every option of `Mamba1Spec`.

    `Mamba1(512)(x)` maps x [b, s, 512] to the same shape.
    """

    describes = Mamba1Spec
    spec: Mamba1Spec

    def __init__(self, d_model: int, spec: Mamba1Spec | None = None, **options: Any) -> None:
        super().__init__(d_model, spec, **options)
        spec = self.spec
        d_inner, d_state, rank = spec.d_inner or 0, spec.d_state, spec.dt_rank or 0
        self.z = Linear(d_model, d_inner, spec.bias)
        self.x = Linear(d_model, d_inner, spec.bias)
        self.conv = CausalConv(d_inner, spec.conv_width, spec.conv_bias)
        self.b = Linear(d_inner, d_state)
        self.c = Linear(d_inner, d_state)
        self.dt_down = Linear(d_inner, rank)
        norm = self.norm_spec.replace(type="rms", bias=False)
        norms = [Norm(width, norm) if spec.inner_norms else None for width in (d_state, d_state, rank)]
        self.b_norm, self.c_norm, self.dt_norm = norms
        self.dt = Linear(rank, d_inner)
        self.dt_bias = nn.Parameter(torch.empty(d_inner))
        self.a_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.skip = nn.Parameter(torch.empty(d_inner))
        self.out = Linear(d_inner, d_model, spec.bias, writes_residual=True)

    def forward(self, x: Tensor, context: Context | None = None, state: MambaState | None = None) -> Tensor:
        """x [b, s, d_model]; the result has its shape. `state` comes from `new_state`, is continued without gradients.

        Raises:
            ValueError: documents together with a state.
        """
        context = context or Context.of(x)
        z = self.z(x)
        x = self.conv(self.x(x), context, state and state.conv)
        # The convolution's bias reaches padding; an input of zero leaves the state at zero.
        x = zero_padding(x, context)
        b, c, dt = self.b(x), self.c(x), self.dt_down(x)
        if self.b_norm is not None and self.c_norm is not None and self.dt_norm is not None:
            b, c, dt = self.b_norm(b), self.c_norm(c), self.dt_norm(dt)
        dt = self.dt(dt)
        with without_autocast(x.device):
            y = self._scan(x, dt, b, c, context, state) * F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))
        return self.out(y.to(x.dtype))

    def new_state(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> MambaState:
        wide = torch.promote_types(dtype, torch.float32)
        memory = torch.zeros(batch_size, *self.a_log.shape, device=device, dtype=wide)
        return MambaState(memory, self.conv.new_state(batch_size, device, dtype))

    def init_weights(self, std: float, out_std: float) -> None:
        """-a the numbers 1, 2, ... along a channel's state, steps log-uniform in [0.001, 0.1], skip 1."""
        with torch.no_grad():
            self.a_log.copy_(torch.arange(1, self.spec.d_state + 1, dtype=torch.float32).log())
        start_steps(self.dt_bias)
        nn.init.ones_(self.skip)

    def _scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, context: Context, state: MambaState | None) -> Tensor:
        """The state-space model: [b, s, d_inner], fp32 at least. What released kernels round to fp32 is rounded."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(torch.float32))
        a = -self.a_log.to(torch.float32).exp()
        rounded, b = x.to(torch.float32), b.to(torch.float32)
        if state is not None and x.shape[1] == 1:
            y = selective_step(rounded[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state.memory)[:, None]
        else:
            start = None if state is None else state.memory
            y, end = selective_scan(rounded, dt, a, b, c, start, context.documents)
            if state is not None:
                state.memory = end.detach().clone()  # not a view that keeps the states of other tokens
        return y + x * self.skip.to(torch.float32)
