"""Multi-head latent attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor

from zoo.blocks.attention import query_scale
from zoo.blocks.base import Context, Linear, Mixer
from zoo.blocks.cache import GrowingCache
from zoo.blocks.compiled_trunk import CausalAttention, attention_fits
from zoo.blocks.indexer import Indexer, causal
from zoo.blocks.masks import visible_keys
from zoo.blocks.norm import Norm
from zoo.blocks.rope import turn, yarn_mscale
from zoo.spec.base import ConfigError
from zoo.spec.mla import MLASpec
from zoo.spec.rope import YarnScaling


class MLA(Mixer):
    """Multi-head latent attention with every option of `MLASpec`.

    `MLA(512, num_heads=8, d_kv_latent=64, nope_head_dim=32, rope_head_dim=16, v_head_dim=32)(x)` maps x [b, s, 512] to
    the same shape. Of a token, generation remembers the normed latent, the turned shared key and the index key.
    """

    describes = MLASpec
    spec: MLASpec

    def __init__(self, d_model: int, spec: MLASpec | None = None, **options: Any) -> None:
        super().__init__(d_model, spec, **options)
        spec, heads = self.spec, self.spec.num_heads
        latent_norm = self.norm_spec.replace(type="rms", bias=False, eps=spec.latent_eps or self.norm_spec.eps)
        d_query, self.q_down, self.q_norm = d_model, None, None
        if spec.d_q_latent is not None:
            d_query = spec.d_q_latent
            self.q_down = Linear(d_model, d_query, spec.latent_bias)
            self.q_norm = Norm(d_query, latent_norm)
        self.q = Linear(d_query, heads * spec.qk_head_dim)
        self.kv_down = Linear(d_model, spec.d_kv_latent, spec.latent_bias)
        self.kv_norm = Norm(spec.d_kv_latent, latent_norm)
        self.k = Linear(spec.d_kv_latent, heads * spec.nope_head_dim)
        self.v = Linear(spec.d_kv_latent, heads * spec.v_head_dim)
        self.k_shared = Linear(d_model, spec.rope_head_dim, spec.latent_bias) if spec.rope_head_dim else None
        self.out = Linear(heads * spec.v_head_dim, d_model, spec.out_bias, writes_residual=True)
        gate_widths = {"element": heads * spec.v_head_dim, "head": heads}
        self.gate = Linear(d_model, gate_widths[spec.gate]) if spec.gate != "none" else None
        self.indexer = None
        if spec.indexer is not None and not spec.indexer.reuse:
            self.indexer = Indexer(spec.indexer, d_model, d_query, spec.rope, spec.rope_head_dim)
        self.scale = softmax_scale(spec)

    def forward(self, x: Tensor, context: Context | None = None, state: GrowingCache | None = None) -> Tensor:
        """x [b, s, d_model]; the result has its shape. `state` comes from `new_state` and is continued in place."""
        context = context or Context.of(x)
        q_source = x if self.q_down is None else self.q_norm(self.q_down(x))  # type: ignore[misc]
        q, memory = self._queries(q_source, context), self._latent_and_shared_key(x, context)
        num_keys = x.shape[1] if state is None else state.length + x.shape[1]
        index_keys = self._index_keys(x, context, num_keys, state)
        if state is not None:
            memory, *index_keys = state.append(memory, *index_keys)
        mask = visible_keys(context, x.shape[1], num_keys, "causal", None)
        if self.spec.indexer is not None and num_keys > self.spec.indexer.top_k:
            mask = causal(context, num_keys) if mask is None else mask
            chosen = self._choose(x, q_source, index_keys, mask, context)
            memory, mask = _restrict(memory, mask, chosen)
        y = self._attend(q, memory, mask, absorb=self.absorbing_pays(q.shape[1], memory.shape[1]))
        if self.gate is not None:
            y = y * _opening(self.gate(x)).to(y.dtype).unflatten(-1, (self.spec.num_heads, -1))
        return self.out(y.flatten(-2))

    def new_state(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> GrowingCache:
        return GrowingCache(batch_size, max_len, None, device, dtype)

    def _queries(self, q_source: Tensor, context: Context) -> Tensor:
        """[b, s, h, nope + rope] at their positions."""
        spec = self.spec
        q: Tensor = self.q(q_source).unflatten(-1, (spec.num_heads, -1))
        if spec.rope is not None:
            still, turning = q.split((spec.nope_head_dim, spec.rope_head_dim), -1)
            q = torch.cat((still, turn(turning, spec.rope, spec.rope_head_dim, context)), -1)
        return q if spec.query_scale is None else q * query_scale(spec.query_scale, context)[..., None, None].to(q)

    def _latent_and_shared_key(self, x: Tensor, context: Context) -> Tensor:
        """[b, s, latent + rope]: all that attention needs to know of a token."""
        latent: Tensor = self.kv_norm(self.kv_down(x))
        if self.k_shared is None:
            return latent
        shared = self.k_shared(x)
        if self.spec.rope is not None:
            shared = turn(shared[:, :, None], self.spec.rope, self.spec.rope_head_dim, context)[:, :, 0]
        return torch.cat((latent, shared), -1)

    def _index_keys(self, x: Tensor, context: Context, num_keys: int, state: GrowingCache | None) -> list[Tensor]:
        """[b, s, head_dim], one or none: a choice is to be made among `num_keys`, or may be in later passes."""
        if self.indexer is None or (state is None and num_keys <= self.indexer.spec.top_k):
            return []
        return [self.indexer.keys(x, context)]

    def _choose(self, x: Tensor, q_source: Tensor, index_keys: list[Tensor], seen: Tensor, context: Context) -> Tensor:
        """[b, s, top_k] int64: the choice of this layer's indexer, or that of the layer before which has one."""
        choices: dict[Any, Tensor] = context.once("index", dict)
        if self.indexer is not None:
            choices["newest"] = self.indexer.choose(x, q_source, index_keys[0], seen[:, 0], context)
            return choices["newest"]
        if not context.recomputing:
            if "newest" not in choices:
                raise ConfigError(
                    "indexer.reuse: found true; no layer before this one makes a choice, set it to false there"
                )
            # Recomputation goes through the layers from the last to the first.
            choices[self] = choices["newest"]
        return choices[self]

    def absorbing_pays(self, num_queries: int, num_keys: int) -> bool:
        """Whether attending to the latents themselves takes fewer products than reading keys and values out of them."""
        spec = self.spec
        read_out = spec.nope_head_dim + spec.v_head_dim
        direct = num_keys * spec.d_kv_latent * read_out + num_queries * num_keys * read_out
        absorbed = num_queries * (spec.d_kv_latent * read_out + num_keys * 2 * spec.d_kv_latent)
        return num_queries < num_keys and absorbed < direct

    def _attend(self, q: Tensor, memory: Tensor, mask: Tensor | None, absorb: bool) -> Tensor:
        """[b, s, h, v] of queries [b, s, h, nope + rope] and memory [b, n, latent + rope].

        Args:
            mask: [b or 1, 1, s, n] as `visible_keys` gives it; None only where s is 1 or n.
            absorb: fold the projection of the keys into the queries and that of the values into the result: then all
                heads attend to the memory as it is (arXiv:2405.04434, section 2.1.2). Equal up to rounding. Needs a
                mask or s = 1.
        """
        spec, heads = self.spec, self.spec.num_heads
        latent, shared = memory.split((spec.d_kv_latent, spec.rope_head_dim), -1)
        if not absorb:
            shared = repeat(shared, "b n k -> b n h k", h=heads)
            k = torch.cat((self.k(latent).unflatten(-1, (heads, -1)), shared), -1)
            v = self.v(latent).unflatten(-1, (heads, -1))
            if mask is None and attention_fits(q, k, v, self.scale):
                y: Tensor = CausalAttention.apply(q, k, v, self.scale)
                return y
            q, k, v = (rearrange(part, "b s h k -> b h s k") for part in (q, k, v))
            causal = mask is None and q.shape[2] > 1
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale)
            return rearrange(y, "b h s v -> b s h v")
        still, turned = q.split((spec.nope_head_dim, spec.rope_head_dim), -1)
        k_weight, v_weight = (part.matrix().unflatten(0, (heads, -1)).to(q.dtype) for part in (self.k, self.v))
        absorbed = torch.cat((einsum(still, k_weight, "b s h k, h k r -> b s h r"), turned), -1)
        if mask is not None:
            mask = repeat(mask, "b 1 s n -> b 1 (s h) n", h=heads)
        q, k, v = rearrange(absorbed, "b s h r -> b 1 (s h) r"), memory[:, None], latent[:, None]
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale)
        y = rearrange(y, "b 1 (s h) r -> b s h r", h=heads)
        return einsum(y, v_weight, "b s h r, h v r -> b s h v")


def softmax_scale(spec: MLASpec) -> float:
    """The factor on query-key products."""
    if spec.scale is not None:
        return spec.scale
    scaling, temperature = spec.rope.scaling if spec.rope else None, 1.0
    if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
        temperature = yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return spec.qk_head_dim**-0.5 * temperature * temperature


def _opening(logits: Tensor) -> Tensor:
    """The sigmoid in fp32 [...] of logits of the same shape.

    torch rounds the last elements of a tensor, which fill no vector register, differently; padding leaves none, so that
    a token's gate does not change with the company.
    """
    wide = logits.to(torch.float32).flatten()
    return torch.sigmoid(F.pad(wide, (0, -len(wide) % 64)))[: len(wide)].view_as(logits)


def _restrict(memory: Tensor, seen: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Memory [b, n, r] and mask [b or 1, 1, s, n] with the keys that are not `chosen` [b, s, c] left out."""
    if chosen.shape[1] == 1:
        memory = memory.gather(1, chosen.mT.expand(-1, -1, memory.shape[-1]))
        return memory, seen.expand(len(chosen), -1, -1, -1).gather(-1, chosen[:, None])
    kept = torch.zeros(*chosen.shape[:2], memory.shape[1], dtype=torch.bool, device=memory.device)
    return memory, seen & kept.scatter_(-1, chosen, True)[:, None]
