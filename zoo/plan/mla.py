"""The cost of multi-head latent attention."""

from __future__ import annotations

from zoo.plan.attention import visible_pairs
from zoo.plan.base import Cost, Weight, linear
from zoo.plan.indexer import PART, choose_keys, indexer_mixing, indexer_weights
from zoo.plan.norm import norm_weights
from zoo.plan.operations import attended, gated, keeping_input, keeping_result, norm, projected, scaled, turned
from zoo.plan.tape import Tape, Value
from zoo.spec.mla import MLASpec


class MLACost(Cost):
    """Projections, products of queries with keys and of scores with values (`scores`), the choice of keys (`indexer`).

    As in training and prefill, where keys and values are read out of the latents once.
    """

    prices = MLASpec
    spec: MLASpec

    def weights(self) -> list[Weight]:
        spec, heads = self.spec, self.spec.num_heads
        latent_norm = self.norm.replace(type="rms", bias=False)
        weights, d_query = [], self.d_model
        if spec.d_q_latent is not None:
            d_query = spec.d_q_latent
            weights += linear("q_down", self.d_model, d_query, spec.latent_bias)
            weights += norm_weights("q_norm", d_query, latent_norm)
        weights += linear("q", d_query, heads * spec.qk_head_dim)
        weights += linear("kv_down", self.d_model, spec.d_kv_latent, spec.latent_bias)
        weights += norm_weights("kv_norm", spec.d_kv_latent, latent_norm)
        weights += linear("k", spec.d_kv_latent, heads * spec.nope_head_dim)
        weights += linear("v", spec.d_kv_latent, heads * spec.v_head_dim)
        if spec.rope_head_dim:
            weights += linear("k_shared", self.d_model, spec.rope_head_dim, spec.latent_bias)
        weights += linear("out", heads * spec.v_head_dim, self.d_model, spec.out_bias)
        if spec.gate != "none":
            weights += linear("gate", self.d_model, heads * spec.v_head_dim if spec.gate == "element" else heads)
        if spec.indexer is not None and not spec.indexer.reuse:
            weights += indexer_weights(spec.indexer, self.d_model, d_query)
        return weights

    def mixing(self, seq_len: int, skip_masked: bool) -> dict[str, float]:
        spec, indexer = self.spec, self.spec.indexer
        top_k = None if indexer is None else indexer.top_k
        pairs = visible_pairs(seq_len, top_k) if skip_masked else seq_len**2
        parts = {"scores": 2 * spec.num_heads * (spec.qk_head_dim + spec.v_head_dim) * pairs / seq_len}
        if indexer is not None and not indexer.reuse:
            parts[PART] = indexer_mixing(indexer, (visible_pairs(seq_len) if skip_masked else seq_len**2) / seq_len)
        return parts

    def forward(self, tape: Tape, x: Value) -> Value:
        spec, heads, inner = self.spec, self.spec.num_heads, self.norm.replace(type="rms", bias=False)
        q_source, d_query = x, self.d_model
        if spec.d_q_latent is not None:
            d_query = spec.d_q_latent
            q_source = norm(tape, projected(tape, x, self.d_model, d_query, spec.latent_bias), d_query, inner)
        q, memory = self._queries(tape, q_source, d_query), self._memory(tape, x)
        chosen = spec.indexer is not None and tape.seq_len > spec.indexer.top_k
        if chosen and spec.indexer is not None and not spec.indexer.reuse:
            choose_keys(tape, spec.indexer)
        y = self._attend(tape, q, memory, mask=tape.num_tokens * tape.seq_len if chosen else 0)
        if spec.gate != "none":
            width = heads * (spec.v_head_dim if spec.gate == "element" else 1)
            opening = keeping_result(tape, keeping_input(tape, projected(tape, x, self.d_model, width)))
            y = gated(tape, y, opening)
        return projected(tape, y, heads * spec.v_head_dim, self.d_model, spec.out_bias)

    def _queries(self, tape: Tape, q_source: Value, d_query: int) -> Value:
        spec, heads = self.spec, self.spec.num_heads
        q = projected(tape, q_source, d_query, heads * spec.qk_head_dim)
        if spec.rope is not None:
            rows = tape.num_tokens * heads
            still, turning = tape.split(q, (rows * spec.nope_head_dim, rows * spec.rope_head_dim))
            q = tape.join([still, turned(tape, turning, spec.rope_head_dim, spec.rope_head_dim, spec.rope)])
        return q if spec.query_scale is None else scaled(tape, q)

    def _memory(self, tape: Tape, x: Value) -> Value:
        spec, width = self.spec, self.spec.d_kv_latent
        inner = self.norm.replace(type="rms", bias=False)
        latent = norm(tape, projected(tape, x, self.d_model, width, spec.latent_bias), width, inner)
        if not spec.rope_head_dim:
            return latent
        shared = projected(tape, x, self.d_model, spec.rope_head_dim, spec.latent_bias)
        if spec.rope is not None:
            shared = turned(tape, shared, spec.rope_head_dim, spec.rope_head_dim, spec.rope)
        return tape.join([latent, shared])

    def _attend(self, tape: Tape, q: Value, memory: Value, mask: int) -> Value:
        spec, heads, tokens = self.spec, self.spec.num_heads, tape.num_tokens
        latent, shared = tape.split(memory, (tokens * spec.d_kv_latent, tokens * spec.rope_head_dim))
        spread = tape.spread(shared, heads)
        k = tape.join([projected(tape, latent, spec.d_kv_latent, heads * spec.nope_head_dim), spread])
        v = projected(tape, latent, spec.d_kv_latent, heads * spec.v_head_dim)
        widths = (spec.qk_head_dim, spec.v_head_dim)
        return attended(tape, q, k, v, num_heads=heads, widths=widths, mask=mask)

    def cache(self, num_tokens: int) -> dict[str, float]:
        spec = self.spec
        chooses = spec.indexer is not None and not spec.indexer.reuse
        indexer = {"indexer": float(num_tokens * spec.indexer.head_dim)} if chooses and spec.indexer else {}
        return {"latents": float(num_tokens * (spec.d_kv_latent + spec.rope_head_dim)), **indexer}

    def flops(self, seq_len: int, skip_masked: bool = True) -> dict[str, float]:
        """As `Cost.flops`; an indexer rests in sequences that do not exceed its top_k."""
        parts = super().flops(seq_len, skip_masked)
        if self.spec.indexer is not None and seq_len <= self.spec.indexer.top_k:
            parts.pop(PART, None)
        return parts
