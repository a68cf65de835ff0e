"""The cost of the gated delta rule."""

from __future__ import annotations

from zoo.plan.base import Cost, Weight, linear
from zoo.spec.delta import DeltaSpec


class DeltaCost(Cost):
    """Projections, and the products inside chunks and with the state (`rule`). The convolution is no matrix product."""

    prices = DeltaSpec
    spec: DeltaSpec

    def weights(self) -> list[Weight]:
        spec, d_model = self.spec, self.d_model
        qk_width, v_width = spec.qk_heads * spec.head_dim, spec.num_heads * spec.v_width
        weights = linear("q", d_model, qk_width) + linear("k", d_model, qk_width) + linear("v", d_model, v_width)
        weights.append(Weight("conv.weight", (2 * qk_width + v_width, 1, spec.conv_width)))
        weights += linear("beta", d_model, spec.num_heads)
        weights += _low_rank("decay", d_model, spec.decay.rank, spec.decay_width)
        weights += [Weight("a_log", (spec.num_heads,)), Weight("dt_bias", (spec.decay_width,))]
        weights += _low_rank("gate", d_model, spec.gate_rank, v_width)
        return [*weights, Weight("norm.weight", (spec.v_width,)), *linear("out", v_width, d_model)]

    def mixing(self, seq_len: int, skip_masked: bool) -> dict[str, float]:
        size = min(self.spec.chunk_size, 1 << (seq_len - 1).bit_length())
        if not skip_masked:  # whole squares, and the last chunk is filled up
            flops = -(-seq_len // size) * self._chunk_flops(size, size**2, size * (size**2 - 1) / 3)
            return {"rule": flops / seq_len}
        flops = sum(
            times * self._chunk_flops(length, length * (length + 1) / 2, length * (length - 1) * (length - 2) / 6)
            for times, length in ((seq_len // size, size), (1, seq_len % size))
        )
        return {"rule": flops / seq_len}

    def cache(self, num_tokens: int) -> dict[str, float]:
        spec = self.spec
        channels = 2 * spec.qk_heads * spec.head_dim + spec.num_heads * spec.v_width
        state = spec.num_heads * spec.head_dim * spec.v_width
        return {"state": float(state), "convolution": float(channels * (spec.conv_width - 1))}

    def _chunk_flops(self, length: int, pairs: float, inverse: float) -> float:
        """Forward FLOPs of one chunk.

        Args:
            length: its tokens.
            pairs: of tokens that products are taken of.
            inverse: multiply-adds of the inverse of its triangular matrix.
        """
        spec = self.spec
        k, v = spec.head_dim, spec.v_width
        by_channel = spec.decay.per == "channel" and k > 1
        # Keys with keys and queries with keys: with a decay for each channel only below the diagonal and for each head.
        among = 2 * k * (spec.num_heads * length * (length - 1) / 2 if by_channel else spec.qk_heads * pairs)
        inside = pairs * (2 * v + k) + inverse
        with_state = 3 * length * k * v
        return 2 * (among + spec.num_heads * (inside + with_state))


def _low_rank(name: str, d_in: int, rank: int | None, d_out: int) -> list[Weight]:
    down = linear(f"{name}_down", d_in, rank) if rank else []
    return down + linear(name, rank or d_in, d_out)
