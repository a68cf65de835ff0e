"""A training step of zoo's own engine, told to a tape: what `zoo.decoder` and `zoo.train.trainer` do with memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

from zoo.plan.base import Cost
from zoo.plan.operations import norm, projected, scaled
from zoo.plan.tape import COMPILED, GRADIENTS, LOGITS, Tape, Value
from zoo.plan.trunk import slot_costs
from zoo.spec.model import KindSpec, ModelSpec
from zoo.spec.pattern import expand

CHUNK_NUMBERS = 2**24
"""Logits that are in memory at a time: `zoo.blocks.linear_loss.CHUNK_NUMBERS`."""


def chunk_rows(num_tokens: int, vocab_size: int) -> int:
    """Tokens of a chunk: `zoo.blocks.linear_loss.chunk_rows`."""
    most = max(1, CHUNK_NUMBERS // vocab_size)
    return math.ceil(num_tokens / math.ceil(num_tokens / most))


class Step:
    """The forward pass of a decoder and its loss.

    Args:
        recompute: as `TrainSpec.recompute`.
    """

    def __init__(self, spec: ModelSpec, tape: Tape, recompute: str) -> None:
        self.spec, self.tape, self.recompute = spec, tape, recompute
        tape.sparing = recompute != "layer"
        self.costs: Mapping[str, Cost] = slot_costs(spec)

    def loss(self) -> Value:
        """The objective of one micro-batch."""
        tape, spec = self.tape, self.spec
        depth = spec.mtp.depth if spec.mtp is not None and spec.mtp.enabled else 0
        hidden = self._hidden(last=depth == 0)
        total = self._cross_entropy(hidden, last=depth == 0)
        for further in range(depth):
            last = further == depth - 1
            hidden = self._mtp_block(hidden, self._embedded(last), last)
            total = tape.add(total, self._cross_entropy(hidden, last))
        return total

    def _hidden(self, last: bool) -> Value:
        x = self._embedded(last)
        for kind in self.spec.layer_kinds:
            x = self._layer_or_again(x, self.spec.kinds[kind])
        return norm(self.tape, x, self.spec.d_model, self.spec.norm)

    def _layer_or_again(self, x: Value, kind: KindSpec) -> Value:
        if self.recompute == "layer":
            return self.tape.recomputed(lambda x: self._layer(x, kind), x)
        return self._layer(x, kind)

    def _layer(self, x: Value, kind: KindSpec) -> Value:
        spec, beside = self.spec, None
        placement, ffn_placement = spec.placement_of(kind), spec.ffn_placement_of(kind)
        if kind.beside is not None:
            beside = self._branch(x, kind.beside, "pre")
        if kind.mixer is not None:
            x = self.tape.add(x, self._branch(x, kind.mixer, placement))
        if kind.ffn is not None:
            x = self.tape.add(x, self._branch(x, kind.ffn, ffn_placement))
        if beside is not None:
            x = self.tape.add(x, beside)
        return scaled(self.tape, x) if spec.layer_scale else x

    def _branch(self, x: Value, slot: str, placement: str) -> Value:
        tape, spec = self.tape, self.spec
        y = x
        if placement != "post":
            y = norm(tape, x, spec.d_model, spec.norm)
            if spec.norm.type == "rms":
                tape.spare(y)
        y = self.costs[slot].forward(tape, y)
        if placement != "pre":
            y = norm(tape, y, spec.d_model, spec.norm)
        return y if spec.residual_scale == 1 else scaled(tape, y)

    def _embedded(self, last: bool) -> Value:
        """The residual stream at the start.

        Args:
            last: nothing after this reads the table, the head aside: then the backward pass comes here first, and the
                table gets its gradient from here unless the head is the table.
        """
        tape, spec = self.tape, self.spec
        with tape.repeated(not last or spec.head.tied):
            x = tape.apply([], tape.num_tokens * spec.d_model, trains=spec.vocab_size * spec.d_model)
        if spec.embedding.scale != "none":
            x = scaled(tape, x)
        if spec.embedding.positions:
            with tape.repeated(not last):
                size = spec.embedding.positions * spec.d_model
                x = tape.add(x, tape.apply([], tape.seq_len * spec.d_model, trains=size))
        return x

    def _mtp_block(self, hidden: Value, embedded: Value, last: bool) -> Value:
        tape, spec = self.tape, self.spec
        assert spec.mtp is not None
        with tape.repeated(spec.mtp.shared and not last):
            parts = [norm(tape, part, spec.d_model, spec.norm) for part in (embedded, hidden)]
            x = projected(tape, tape.join(parts), 2 * spec.d_model, spec.d_model)
            for kind in expand(spec.mtp.layers):
                x = self._layer(x, spec.kinds[kind])
            return norm(tape, x, spec.d_model, spec.norm)

    def _cross_entropy(self, hidden: Value, last: bool) -> Value:
        """`zoo.blocks.linear_loss`: both gradients are made chunk by chunk in the forward pass and kept."""
        tape, spec = self.tape, self.spec
        weights = spec.vocab_size * spec.d_model
        trained = 0 if tape.frozen else weights
        kept = [tape.new(hidden.numel, kind=LOGITS), tape.new(trained, 4, LOGITS)]
        bias = spec.vocab_size if spec.head.bias else 0
        rows = chunk_rows(tape.num_tokens, spec.vocab_size)
        compiled = tape.itemsize == COMPILED and spec.head.scale == 1 and spec.head.softcap is None
        logits = capped = grad = None
        for start in range(0, min(tape.num_tokens, 2 * rows), rows):  # a third chunk would be as the second
            chunk = min(rows, tape.num_tokens - start) * spec.vocab_size
            logits = capped = grad = None
            logits = capped = tape.new(chunk, 4, LOGITS)
            if compiled:  # the logits become their gradients
                continue
            if spec.head.scale != 1:
                capped = tape.new(chunk, 4, LOGITS)
            if spec.head.softcap is not None:
                capped = tape.new(2 * chunk, 4, LOGITS)
            grad = tape.new(chunk, 4, LOGITS)
            if spec.head.softcap is not None:
                tape.new(2 * chunk, 4, LOGITS)
            if tape.itemsize < COMPILED:
                tape.new(trained, kind=LOGITS)
        del logits, capped, grad
        again = tape.again or not last

        def pull(grads: list[Value | None]) -> list[Value | None]:
            hidden_grad, weight_grad = given.pop()
            if tape.itemsize == COMPILED and not again:  # what was kept is the gradient
                weight_grad.storage.become(GRADIENTS)
                tape.gradients.append(weight_grad.storage)
                tape.train(bias, again)
            else:
                tape.train(weights + bias, again)
            return [hidden_grad]

        given = [kept]
        return tape.record(tape.new(1), [hidden], kept, pull, trains=True)
