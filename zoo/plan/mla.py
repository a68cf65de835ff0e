"""The cost of multi-head latent attention."""

from __future__ import annotations

from zoo.plan.attention import visible_pairs
from zoo.plan.base import Cost, Weight, linear
from zoo.plan.indexer import PART, indexer_mixing, indexer_weights
from zoo.plan.norm import norm_weights
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
