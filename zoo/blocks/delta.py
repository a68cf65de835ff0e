"""The gated delta rule as a sequence mixer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.autocast import without_autocast
from zoo.blocks.base import Context, Linear, Mixer
from zoo.blocks.compiled_mixers import CompiledGatedNorm, CompiledUnit, fits
from zoo.blocks.conv import CausalConv, ConvState
from zoo.blocks.delta_rule import delta_chunks, delta_step
from zoo.spec.delta import DeltaSpec

L2_EPS = 1e-6
"""Added to the squared length of queries and keys before they are divided by it, as released kernels do."""


class DeltaState:
    """What the mixer remembers: a matrix for each head, fp32 at least, and the last inputs of the convolution."""

    def __init__(self, memory: Tensor, conv: ConvState) -> None:
        self.memory = memory
        """[b, h, k, v]."""
        self.conv = conv

    def select(self, rows: Tensor) -> None:
        """Keep the rows of the batch that `rows` [b'] int64 names, in that order."""
        self.memory = self.memory[rows]
        self.conv.select(rows)


class GatedDelta(Mixer):
    """The gated delta rule (arXiv:2412.06464, arXiv:2510.26692) with every option of `DeltaSpec`.

    `GatedDelta(512, num_heads=8, head_dim=64)(x)` maps x [b, s, 512] to the same shape.
    """

    describes = DeltaSpec
    spec: DeltaSpec

    def __init__(self, d_model: int, spec: DeltaSpec | None = None, **options: Any) -> None:
        super().__init__(d_model, spec, **options)
        spec = self.spec
        qk_width, v_width = spec.qk_heads * spec.head_dim, spec.num_heads * spec.v_width
        self.q = Linear(d_model, qk_width)
        self.k = Linear(d_model, qk_width)
        self.v = Linear(d_model, v_width)
        self.conv = CausalConv(2 * qk_width + v_width, spec.conv_width)
        self.beta = Linear(d_model, spec.num_heads)
        self.decay_down = Linear(d_model, spec.decay.rank) if spec.decay.rank else None
        self.decay = Linear(spec.decay.rank or d_model, spec.decay_width)
        self.a_log = nn.Parameter(torch.empty(spec.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(spec.decay_width))
        self.gate_down = Linear(d_model, spec.gate_rank) if spec.gate_rank else None
        self.gate = Linear(spec.gate_rank or d_model, v_width)
        self.norm = GatedNorm(spec.v_width, spec, spec.norm_eps or self.norm_spec.eps)
        self.out = Linear(v_width, d_model, writes_residual=True)

    def forward(self, x: Tensor, context: Context | None = None, state: DeltaState | None = None) -> Tensor:
        """x [b, s, d_model]; the result has its shape. `state`, from `new_state`, is continued without gradients.

        Raises:
            ValueError: documents together with a state.
        """
        # Padding is zeros in front of the convolution, so its keys and values are zero and write nothing.
        qkv = torch.cat((self.q(x), self.k(x), self.v(x)), -1)
        qkv = self.conv(qkv, context, None if state is None else state.conv)
        gate = self.gate(x if self.gate_down is None else self.gate_down(x)).unflatten(-1, (self.spec.num_heads, -1))
        log_decay, beta = self._log_decay(x), torch.sigmoid(self.beta(x)) * self.spec.beta_scale
        with without_autocast(x.device):
            y = self._mix(qkv, log_decay, beta, None if context is None else context.documents, state)
            y = self.norm(y.to(qkv.dtype), gate)
        return self.out(y.flatten(-2))

    def new_state(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> DeltaState:
        spec, wide = self.spec, torch.promote_types(dtype, torch.float32)
        memory = torch.zeros(batch_size, spec.num_heads, spec.head_dim, spec.v_width, device=device, dtype=wide)
        return DeltaState(memory, self.conv.new_state(batch_size, device, dtype))

    def init_weights(self, std: float, out_std: float) -> None:
        """exp(a_log) uniform in [1, 16]; softplus(dt_bias) log-uniform in [0.001, 0.1], as in arXiv:2312.00752."""
        nn.init.uniform_(self.a_log, 1, 16)
        nn.init.uniform_(self.dt_bias, math.log(1e-3), math.log(1e-1))
        with torch.no_grad():
            self.a_log.log_()
            step = self.dt_bias.exp()
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def _log_decay(self, x: Tensor) -> Tensor:
        """[b, s, h, 1 or k], fp32 at least."""
        logits = self.decay(x if self.decay_down is None else self.decay_down(x))
        wide, bound = torch.promote_types(logits.dtype, torch.float32), self.spec.decay.lower_bound
        logits = (logits.to(wide) + self.dt_bias.to(wide)).unflatten(-1, (self.spec.num_heads, -1))
        rate = self.a_log.to(wide).exp()[:, None]
        return -rate * F.softplus(logits) if bound is None else bound * torch.sigmoid(rate * logits)

    def _mix(
        self, qkv: Tensor, log_decay: Tensor, beta: Tensor, documents: Tensor | None, state: DeltaState | None
    ) -> Tensor:
        """The delta rule over queries, keys and values [b, s, 2 g k + h v]: [b, s, h, v], fp32 at least."""
        spec, wide = self.spec, log_decay.dtype
        qk_width = 2 * spec.qk_heads * spec.head_dim
        qk, v = qkv.to(wide).split((qk_width, qkv.shape[-1] - qk_width), -1)
        q, k = self._unit(qk.unflatten(-1, (2 * spec.qk_heads, -1))).chunk(2, -2)
        v = v.unflatten(-1, (spec.num_heads, -1))
        beta = beta.to(wide)
        if state is None:
            return self.recur(q, k, v, log_decay, beta, None, documents)[0]
        if q.shape[1] == 1:
            q, k = (part[:, 0].repeat_interleave(spec.num_heads // spec.qk_heads, 1) for part in (q, k))
            y, memory = delta_step(q, k, v[:, 0], log_decay[:, 0], beta[:, 0], state.memory)
            state.memory = memory.detach()
            return y[:, None]
        y, memory = self.recur(q, k, v, log_decay, beta, state.memory, None)
        state.memory = memory.detach().clone()  # not a view that keeps the states of all chunks
        return y

    def _unit(self, qk: Tensor) -> Tensor:
        """Queries, then keys, [b, s, 2 g, k], divided by their lengths; queries scaled."""
        scale = self.spec.head_dim**-0.5
        if fits(qk):
            found: Tensor = CompiledUnit.apply(qk, L2_EPS, self.spec.qk_heads, scale)
            return found
        q, k = (qk * torch.rsqrt(qk.square().sum(-1, keepdim=True) + L2_EPS)).chunk(2, -2)
        return torch.cat((q * scale, k), -2)

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        start: Tensor | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The delta rule over many tokens, as `zoo.blocks.delta_rule.delta_chunks` does it."""
        return delta_chunks(q, k, v, log_decay, beta, start, documents, self.spec.chunk_size)


class GatedNorm(nn.Module):
    """RMS norm of each value head, then its gate."""

    def __init__(self, width: int, spec: DeltaSpec, eps: float) -> None:
        super().__init__()
        self.eps, self.wide_weight = eps, spec.norm_weight == "fp32"
        self.sigmoid_gate = spec.gate_activation == "sigmoid"
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate [..., width]; the result has the shape and dtype of x. Computed in fp32 at least."""
        if fits(x, gate, self.weight):
            found: Tensor = CompiledGatedNorm.apply(x, gate, self.weight, self.eps, self.sigmoid_gate, True)
            return found
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(wide if self.wide_weight else x.dtype)
        normed = F.rms_norm(x.to(wide), weight.shape, None, self.eps)
        normed = normed if self.wide_weight else normed.to(x.dtype)
        activation = torch.sigmoid if self.sigmoid_gate else F.silu
        return (normed * weight * activation(gate.to(wide))).to(x.dtype)

    def init_weights(self, std: float, out_std: float) -> None:
        nn.init.ones_(self.weight)
