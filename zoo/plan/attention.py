"""The cost of attention over keys and values."""

from __future__ import annotations

from zoo.plan.base import Cost, Weight, linear
from zoo.plan.indexer import PART, block_indexer_mixing, block_indexer_weights, choose_blocks
from zoo.plan.norm import norm_weights
from zoo.plan.operations import (
    attended,
    attended_eagerly,
    gated,
    keeping_input,
    keeping_result,
    norm,
    projected,
    scaled,
    turned,
)
from zoo.plan.tape import Tape, Value
from zoo.spec.attention import AttentionSpec
from zoo.spec.norm import NormSpec


def visible_pairs(seq_len: int, window: int | None = None, chunked: bool = False) -> int:
    """Pairs of a query and a key that it sees in a sequence of `seq_len` tokens, itself included.

    Args:
        window: keys that a query sees at most; None: all earlier ones.
        chunked: a query sees the earlier keys of its own chunk of `window` tokens, not the last `window` keys.
    """
    if window is None or window >= seq_len:
        return _triangle(seq_len)
    if chunked:
        chunks, rest = divmod(seq_len, window)
        return chunks * _triangle(window) + _triangle(rest)
    return _triangle(window) + (seq_len - window) * window


def chosen_pairs(seq_len: int, block_size: int, top_k: int) -> int:
    """Pairs of a query and a key in the `top_k` blocks that it attends to, of which its own block is one."""
    first = min(seq_len, block_size * top_k)
    rest = seq_len - first
    return _triangle(first) + rest * block_size * (top_k - 1) + visible_pairs(rest, block_size, chunked=True)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


class AttentionCost(Cost):
    """Projections, and the products of queries with keys and of their scores with values (`scores`)."""

    prices = AttentionSpec
    spec: AttentionSpec

    def __init__(self, spec: AttentionSpec, d_model: int, norm: NormSpec) -> None:
        super().__init__(spec, d_model, norm)
        self.head_dim, self.v_head_dim = self.spec.head_dim or 0, self.spec.v_head_dim or 0

    def weights(self) -> list[Weight]:
        spec, heads, groups = self.spec, self.spec.num_heads, self.spec.num_kv_heads
        weights = linear("q", self.d_model, heads * self.head_dim, spec.qkv_bias)
        weights += linear("k", self.d_model, groups * self.head_dim, spec.qkv_bias)
        if not spec.shared_kv:
            weights += linear("v", self.d_model, groups * self.v_head_dim, spec.qkv_bias)
        weights += linear("out", heads * self.v_head_dim, self.d_model, spec.out_bias)
        if spec.gate != "none":
            weights += linear("gate", self.d_model, heads * self.v_head_dim if spec.gate == "element" else heads)
        if spec.sink:
            weights.append(Weight("sink", (heads,)))
        if spec.indexer is not None:
            inner = self.norm.replace(type="rms", bias=False)
            weights += block_indexer_weights(spec.indexer, self.d_model, inner)
        return weights + self._qk_norm_weights()

    def _qk_norm_weights(self) -> list[Weight]:
        spec, inner = self.spec, self.norm.replace(type="rms", bias=False)
        if spec.qk_norm == "none" or spec.qk_norm_weight == "none":
            return []
        q_heads, k_heads = (spec.num_heads, spec.num_kv_heads) if spec.qk_norm == "full" else (1, 1)
        q_norm = norm_weights("q_norm", q_heads * self.head_dim, inner)
        return q_norm + norm_weights("k_norm", k_heads * self.head_dim, inner)

    def mixing(self, seq_len: int, skip_masked: bool) -> dict[str, float]:
        spec = self.spec
        pairs = visible_pairs(seq_len, spec.window, spec.mask == "chunked") if skip_masked else seq_len**2
        parts = {}
        if spec.indexer is not None:
            parts[PART] = block_indexer_mixing(spec.indexer, pairs / seq_len)
            if skip_masked:
                pairs = chosen_pairs(seq_len, spec.indexer.block_size, spec.indexer.top_k)
        return {"scores": 2 * spec.num_heads * (self.head_dim + self.v_head_dim) * pairs / seq_len, **parts}

    def forward(self, tape: Tape, x: Value) -> Value:
        spec = self.spec
        q, k, v = self._project(tape, x)
        q, k = self._place(tape, q), self._place(tape, k)
        eager = spec.softcap is not None or spec.sink
        if spec.qk_norm == "head" and spec.rope and not (spec.qk_norm_after_rope or spec.query_scale or eager):
            q, k = tape.spare(q), tape.spare(k)
        if spec.query_scale is not None:
            q = scaled(tape, q)
        mask = tape.seq_len**2 if spec.window is not None and spec.window < tape.seq_len else 0
        if spec.indexer is not None and tape.seq_len > spec.indexer.block_size * spec.indexer.top_k:
            mask = tape.num_tokens * tape.seq_len * spec.num_heads
            choose_blocks(tape, spec.indexer)
        y = self._attend(tape, q, k, v, mask)
        if spec.gate != "none":
            rows = tape.num_tokens * spec.num_heads
            gate = projected(
                tape, x, self.d_model, rows * (self.v_head_dim if spec.gate == "element" else 1) // tape.num_tokens
            )
            y = gated(tape, y, keeping_result(tape, gate))
        return projected(tape, y, spec.num_heads * self.v_head_dim, self.d_model, spec.out_bias)

    def _project(self, tape: Tape, x: Value) -> tuple[Value, Value, Value]:
        spec, inner = self.spec, self.norm.replace(type="rms", bias=False)
        q_width, k_width = spec.num_heads * self.head_dim, spec.num_kv_heads * self.head_dim
        v_width = spec.num_kv_heads * self.v_head_dim
        q, k = (projected(tape, x, self.d_model, width, spec.qkv_bias) for width in (q_width, k_width))
        v = k if spec.shared_kv else projected(tape, x, self.d_model, v_width, spec.qkv_bias)
        if spec.qkv_clip is not None:
            q, k, v = (keeping_input(tape, part) for part in (q, k, v))
        if spec.qk_norm == "full" and not spec.qk_norm_after_rope:
            q, k = norm(tape, q, q_width, self._qk_norm()), norm(tape, k, k_width, self._qk_norm())
        if spec.v_norm:
            v = norm(tape, v, self.v_head_dim, inner.replace(weight="none"))
        return q, k, v if spec.value_scale == 1 else scaled(tape, v)

    def _qk_norm(self) -> NormSpec:
        weight = self.norm.weight if self.spec.qk_norm_weight == "model" else "none"
        return self.norm.replace(type="rms", bias=False, weight=weight)

    def _place(self, tape: Tape, x: Value) -> Value:
        """Queries or keys, normed and at their positions."""
        spec = self.spec
        per_head = spec.qk_norm == "head" or (spec.qk_norm == "full" and spec.qk_norm_after_rope)
        width = self.head_dim if spec.qk_norm == "head" else x.numel // tape.num_tokens
        if per_head and not spec.qk_norm_after_rope:
            x = norm(tape, x, width, self._qk_norm())
        if spec.rope is not None:
            x = turned(tape, x, self.head_dim, spec.rope.rotary_dim(self.head_dim), spec.rope)
        if per_head and spec.qk_norm_after_rope:
            x = norm(tape, x, width, self._qk_norm())
        return x

    def _attend(self, tape: Tape, q: Value, k: Value, v: Value, mask: int) -> Value:
        spec, widths = self.spec, (self.head_dim, self.v_head_dim)
        if spec.softcap is not None or spec.sink:
            return attended_eagerly(tape, q, k, v, spec.num_heads, widths, spec.softcap is not None)
        return attended(tape, q, k, v, num_heads=spec.num_heads, widths=widths, mask=mask)

    def cache(self, num_tokens: int) -> dict[str, float]:
        spec, groups = self.spec, self.spec.num_kv_heads
        kept = num_tokens if spec.window is None else min(num_tokens, spec.window - 1)
        indexer = {"indexer": float(kept * spec.indexer.head_dim)} if spec.indexer is not None else {}
        return {
            "keys": float(kept * groups * self.head_dim),
            "values": float(kept * groups * self.v_head_dim),
            **indexer,
        }

    def flops(self, seq_len: int, skip_masked: bool = True) -> dict[str, float]:
        """As `Cost.flops`; an indexer rests in sequences that do not exceed the keys that it chooses."""
        parts, indexer = super().flops(seq_len, skip_masked), self.spec.indexer
        if indexer is not None and seq_len <= indexer.block_size * indexer.top_k:
            parts.pop(PART, None)
        return parts
