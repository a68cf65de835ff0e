"""Attention over keys and values shared by groups of heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from zoo.blocks.base import Context, Linear, Mixer
from zoo.blocks.cache import GrowingCache
from zoo.blocks.compiled_trunk import CausalAttention, attention_fits
from zoo.blocks.indexer import BlockIndexer
from zoo.blocks.masks import visible_keys
from zoo.blocks.norm import Norm
from zoo.blocks.rope import depends_on_length, rotary_tables, rotate, turn
from zoo.blocks.sparing import sparing
from zoo.spec.attention import AttentionSpec, QueryScaleSpec


class Attention(Mixer):
    """Multi-head, grouped-query or multi-query attention with every option of `AttentionSpec`.

    `Attention(512, num_heads=8, num_kv_heads=2)(x)` maps x [b, s, 512] to the same shape.
    """

    describes = AttentionSpec
    spec: AttentionSpec

    def __init__(self, d_model: int, spec: AttentionSpec | None = None, **options: Any) -> None:
        super().__init__(d_model, spec, **options)
        spec = self.spec
        heads, groups = spec.num_heads, spec.num_kv_heads
        self.head_dim, self.v_head_dim = spec.head_dim or 0, spec.v_head_dim or 0
        self.scale = spec.scale if spec.scale is not None else self.head_dim**-0.5
        self.q = Linear(d_model, heads * self.head_dim, spec.qkv_bias)
        self.k = Linear(d_model, groups * self.head_dim, spec.qkv_bias)
        self.v = None if spec.shared_kv else Linear(d_model, groups * self.v_head_dim, spec.qkv_bias)
        self.out = Linear(heads * self.v_head_dim, d_model, spec.out_bias, writes_residual=True)
        self.q_norm, self.k_norm = self._qk_norm(heads), self._qk_norm(groups)
        self.v_norm = Norm(self.v_head_dim, self._inner_norm("none")) if spec.v_norm else None
        gate_widths = {"none": 0, "element": heads * self.v_head_dim, "head": heads}
        self.gate = Linear(d_model, gate_widths[spec.gate]) if spec.gate != "none" else None
        self.sink = nn.Parameter(torch.empty(heads)) if spec.sink else None
        self.indexer = None
        if spec.indexer is not None:
            rotary_dim = spec.rope.rotary_dim(self.head_dim) if spec.rope else 0
            self.indexer = BlockIndexer(spec.indexer, d_model, self._inner_norm("model"), spec.rope, rotary_dim)

    def _inner_norm(self, weight: str) -> Any:
        chosen = self.norm_spec.weight if weight == "model" else weight
        return self.norm_spec.replace(type="rms", weight=chosen, bias=False)

    def _qk_norm(self, heads: int) -> Norm | None:
        if self.spec.qk_norm == "none":
            return None
        width = self.head_dim if self.spec.qk_norm == "head" else heads * self.head_dim
        return Norm(width, self._inner_norm(self.spec.qk_norm_weight))

    def forward(self, x: Tensor, context: Context | None = None, state: GrowingCache | None = None) -> Tensor:
        """x [b, s, d_model]; the result has its shape. `state` comes from `new_state` and is continued in place."""
        context = context or Context.of(x)
        q, k, v = self._project(x)
        raw = (q, k)
        q, k = self._place(q, context), k if self._keeps_raw_keys else self._place(k, context, is_key=True)
        q = (
            q
            if self.spec.query_scale is None
            else q * query_scale(self.spec.query_scale, context)[..., None, None].to(q)
        )
        index_keys = [] if self.indexer is None else self.indexer.keys(x, context, state is not None)
        if state is not None:
            k, v, *index_keys = state.append(k, v, *index_keys)
        if self._keeps_raw_keys:
            k = self._place(k, context, is_key=True)
        mask = visible_keys(context, q.shape[1], k.shape[1], self.spec.mask, self.spec.window)
        if self.indexer is not None and k.shape[1] > self.indexer.rests_until:
            mask = self.indexer.restrict(x, index_keys[0], mask, context, self.spec.num_heads)
        if mask is None and self.sink is None and self.spec.softcap is None and attention_fits(q, k, v, self.scale):
            with self._spared(raw, (q, k), context):
                y: Tensor = CausalAttention.apply(q, k, v, self.scale)
        else:
            q, k, v = (rearrange(part, "b s h k -> b h s k") for part in (q, k, v))
            y = rearrange(self._attend(q, k, v, mask), "b h s k -> b s h k")
        if self.gate is not None:
            y = y * self._opening(self.gate(x)).unflatten(-1, (self.spec.num_heads, -1))
        return self.out(y.flatten(-2))

    def new_state(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> GrowingCache:
        return GrowingCache(batch_size, max_len, self.spec.window, device, dtype)

    def init_weights(self, std: float, out_std: float) -> None:
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def _opening(self, gate: Tensor) -> Tensor:
        if self.spec.gate_activation == "sigmoid":
            return torch.sigmoid(gate)
        # torch rounds numbers that do not fill a vector register differently: whole registers keep a token's gate what
        # it is, whatever the company.
        flat = gate.to(torch.float32).flatten()
        return F.softplus(F.pad(flat, (0, -flat.numel() % 32)))[: flat.numel()].view(gate.shape).to(gate.dtype)

    @property
    def _keeps_raw_keys(self) -> bool:
        return self.spec.rope is not None and depends_on_length(self.spec.rope)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, s, h, k], keys [b, s, g, k] and values [b, s, g, v] before their positions."""
        spec = self.spec
        q, k = self.q(x), self.k(x)
        v = k if self.v is None else self.v(x)
        if spec.qkv_clip is not None:
            q, k, v = (part.clamp(-spec.qkv_clip, spec.qkv_clip) for part in (q, k, v))
        if spec.qk_norm == "full" and not spec.qk_norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]
        q, k, v = (
            part.unflatten(-1, (-1, width))
            for part, width in ((q, self.head_dim), (k, self.head_dim), (v, self.v_head_dim))
        )
        if self.v_norm is not None:
            v = self.v_norm(v)
        return q, k, v if spec.value_scale == 1 else v * spec.value_scale

    def _place(self, x: Tensor, context: Context, is_key: bool = False) -> Tensor:
        """Norm and rotate queries or keys [b, s, h, k]; keys may be more than those of this pass."""
        spec, norm = self.spec, self.k_norm if is_key else self.q_norm
        per_head = norm if spec.qk_norm == "head" or spec.qk_norm_after_rope else None
        if per_head is not None and not spec.qk_norm_after_rope:
            x = per_head(x)
        if spec.rope is not None:
            x = turn(x, spec.rope, spec.rope.rotary_dim(self.head_dim), context)
        if per_head is not None and spec.qk_norm_after_rope:
            x = per_head(x) if spec.qk_norm == "head" else per_head(x.flatten(-2)).unflatten(-1, (-1, self.head_dim))
        return x

    def _spared(
        self, raw: tuple[Tensor, Tensor], placed: tuple[Tensor, Tensor], context: Context
    ) -> AbstractContextManager[None]:
        """Within, what keeps the placed queries and keys keeps nothing: their norms keep the raw ones in any case."""
        spec, norms = self.spec, (self.q_norm, self.k_norm)
        straight = spec.qk_norm == "head" and not spec.qk_norm_after_rope and spec.query_scale is None
        if not (context.sparing and straight and torch.is_grad_enabled()) or spec.rope is None or self._keeps_raw_keys:
            return nullcontext()
        rope, tables = spec.rope, rotary_tables(spec.rope, spec.rope.rotary_dim(self.head_dim), context)

        def make(norm: Any, given: Tensor) -> Callable[[], Tensor]:
            return lambda: rotate(norm.forward(given), *tables, rope.layout, rope.arithmetic)

        made = (make(norm, part.detach()) for norm, part in zip(norms, raw, strict=True))
        return sparing(*zip(placed, made, strict=True))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [b, h, s, k], k [b, g, n, k], v [b, g, n, v], mask as `visible_keys` gives it; the result [b, h, s, v]."""
        if self.spec.softcap is not None or self.sink is not None:
            return self._attend_eagerly(q, k, v, mask)
        causal = mask is None and q.shape[2] > 1
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=grouped)

    def _attend_eagerly(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """With the whole matrix of scores in memory: what fused attention has no option for."""
        spec, repeats = self.spec, q.shape[1] // k.shape[1]
        k, v = (repeat(part, "b g n k -> b (g r) n k", r=repeats) for part in (k, v))
        scores = q @ k.mT * self.scale
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        if mask is None and scores.shape[-2] > 1:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        if self.sink is not None:
            sink = self.sink.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat((scores, sink), -1).softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        else:
            # torch rounds the softmax of fewer than 8 numbers differently: without this a first token would change in
            # the company of later ones.
            scores = F.pad(scores, (0, max(0, 8 - scores.shape[-1])), value=-math.inf)
            weights = scores.softmax(-1, dtype=torch.float32)
        return weights[..., : k.shape[2]].to(v.dtype) @ v


def query_scale(spec: QueryScaleSpec, context: Context) -> Tensor:
    """[b or 1, s] fp32."""
    steps = torch.floor((context.positions.to(torch.float32) + spec.shift) / spec.original_context)
    # As released models write it: log1p differs in the last bit.
    return 1 + spec.beta * torch.log(1 + steps)
