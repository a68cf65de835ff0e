"""The cost of the gated delta rule."""

from __future__ import annotations

from zoo.plan.base import Cost, Weight, linear
from zoo.plan.operations import convolved, keeping_input, keeping_result, norm, projected, scaled, times
from zoo.plan.tape import COMPILED, Tape, Value
from zoo.spec.delta import DeltaSpec
from zoo.spec.norm import NormSpec


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

    def forward(self, tape: Tape, x: Value) -> Value:
        spec, d_model, v_width = self.spec, self.d_model, self.spec.num_heads * self.spec.v_width
        qk_width = spec.qk_heads * spec.head_dim
        qkv = tape.join([projected(tape, x, d_model, width) for width in (qk_width, qk_width, v_width)])
        qkv = convolved(tape, qkv, 2 * qk_width + v_width, spec.conv_width, bias=False, activated=True)
        gate = _low_rank_forward(tape, x, d_model, spec.gate_rank, v_width)
        log_decay = self._log_decay(tape, x)
        beta = scaled(tape, keeping_result(tape, projected(tape, x, d_model, spec.num_heads)))
        y = self._mix(tape, qkv, log_decay, beta)
        if y.itemsize == COMPILED:
            y = tape.apply([y, gate], y.numel, saves=[y, gate], trains=spec.v_width)
        else:
            y = times(tape, norm(tape, y, spec.v_width, NormSpec()), keeping_input(tape, gate))
        return projected(tape, y, v_width, d_model)

    def _log_decay(self, tape: Tape, x: Value) -> Value:
        spec = self.spec
        logits = _low_rank_forward(tape, x, self.d_model, spec.decay.rank, spec.decay_width)
        logits = tape.apply([logits], logits.numel, trains=spec.decay_width)
        if spec.decay.lower_bound is None:
            steps = keeping_input(tape, logits)
            return tape.apply([steps], steps.numel, saves=[steps], grad_work=steps.numel, trains=spec.num_heads)
        rated = tape.apply([logits], logits.numel, saves=[logits], grad_work=logits.numel, trains=spec.num_heads)
        return scaled(tape, keeping_result(tape, rated))

    def _mix(self, tape: Tape, qkv: Value, log_decay: Value, beta: Value) -> Value:
        """Queries and keys of length 1, then the rule."""
        spec, tokens = self.spec, tape.num_tokens
        qk_width = spec.qk_heads * spec.head_dim
        qk, v = tape.split(qkv, (2 * tokens * qk_width, tokens * spec.num_heads * spec.v_width))
        if qkv.itemsize != COMPILED:
            qk = tape.apply([qk], qk.numel, saves=[qkv], keeps=tokens * 2 * spec.qk_heads, grad_work=3 * qk.numel)
            q, k = tape.split(qk, (tokens * qk_width, tokens * qk_width))
            q, k = tape.split(tape.join((scaled(tape, q), k)), (tokens * qk_width, tokens * qk_width))
            return self._chunks(tape, q, k, v, log_decay, beta)
        qk = tape.apply([qk], qk.numel, saves=[qkv])
        q, k = tape.split(qk, (tokens * qk_width, tokens * qk_width))
        if spec.decay.per == "channel":
            return self._chunks(tape, q, k, v, log_decay, beta)
        state = tape.batch_size * spec.num_heads * spec.head_dim * spec.v_width
        inputs = [q, k, v, log_decay, beta]
        return tape.apply(
            inputs, tokens * spec.num_heads * spec.v_width, saves=inputs, keeps=state, work=state, grad_work=2 * state
        )

    def _chunks(self, tape: Tape, q: Value, k: Value, v: Value, log_decay: Value, beta: Value) -> Value:
        """`zoo.blocks.delta_rule.delta_chunks`."""
        spec, heads = self.spec, self.spec.num_heads
        size = min(spec.chunk_size, 1 << (tape.seq_len - 1).bit_length())
        chunks = -(-tape.seq_len // size) * tape.batch_size
        rows = chunks * size * heads
        pairs, keys, values = rows * size, rows * spec.head_dim, rows * spec.v_width
        q, k, v, log_decay, beta = (
            tape.apply([part], part.numel * chunks * size // tape.num_tokens) for part in (q, k, v, log_decay, beta)
        )
        enter, leave = (keeping_result(tape, scaled(tape, log_decay)) for _ in range(2))
        among_keys, among_queries = self._pairs(tape, q, k, log_decay, pairs)
        inverse = tape.apply([times(tape, among_keys, beta)], pairs, saves_result=True, grad_work=2 * pairs)
        solved = times(tape, inverse, beta)
        del among_keys, inverse
        writes = tape.apply([solved, v], values, saves=[solved, v])
        reads = self._read(tape, solved, self._shared(tape, k, enter, keys), keys)
        state = chunks * heads * spec.head_dim * spec.v_width
        kept_keys = self._shared(tape, k, leave, keys)
        new, before = self._scan(tape, writes, reads, kept_keys, state)
        del writes, reads, kept_keys
        y = tape.add(
            self._read(tape, self._shared(tape, q, enter, keys), before, values),
            self._read(tape, among_queries, new, values),
        )
        return tape.apply([y], tape.num_tokens * heads * spec.v_width)

    @staticmethod
    def _read(tape: Tape, left: Value, right: Value, numel: int) -> Value:
        return tape.apply([left, right], numel, saves=[left, right])

    @staticmethod
    def _shared(tape: Tape, x: Value, factor: Value, numel: int) -> Value:
        return tape.apply([x, factor], numel, saves=[x, factor], grad_work=numel)

    def _pairs(self, tape: Tape, q: Value, k: Value, log_decay: Value, pairs: int) -> tuple[Value, Value]:
        spec = self.spec
        if spec.decay.per == "channel" and spec.head_dim > 1:
            both = tape.apply(
                [q, k, log_decay], 2 * pairs, saves=[q, k, log_decay], work=4 * k.numel, grad_work=6 * k.numel
            )
            among_keys, among_queries = tape.split(both, (pairs, pairs))
            return among_keys, among_queries
        faded = tape.apply([log_decay], pairs, saves_result=True, work=2 * pairs, grad_work=2 * pairs)
        shared = pairs * spec.qk_heads // spec.num_heads
        among = [tape.apply([x, k], shared, saves=[x, k]) for x in (k, q)]
        among_keys, among_queries = (self._shared(tape, part, faded, pairs) for part in among)
        return among_keys, among_queries

    def _scan(self, tape: Tape, writes: Value, reads: Value, keys: Value, state: int) -> tuple[Value, Value]:
        both = tape.apply(
            [writes, reads, keys],
            writes.numel + state,
            saves=[reads, keys],
            saves_result=True,
            grad_work=writes.numel + state,
        )
        new, before = tape.split(both, (writes.numel, state))
        return new, before

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


def _low_rank_forward(tape: Tape, x: Value, d_in: int, rank: int | None, d_out: int) -> Value:
    if rank:
        x = projected(tape, x, d_in, rank)
    return projected(tape, x, rank or d_in, d_out)
