"""How well a model predicts texts: nats a token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from zoo.decoder import Decoder
from zoo.eval.scoring import score, windows
from zoo.hf.tokenizer import Text


@dataclass(frozen=True)
class Prediction:
    """What a model makes of some documents."""

    documents: int
    tokens: int
    """Those that were predicted."""
    bytes: int
    """Of the whole documents, in UTF-8."""
    nats: float
    """Minus the logarithm of the documents' probability."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Of a token: comparable between models with the same tokenizer only."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between all models."""
        return self.nats / math.log(2) / self.bytes

    def __add__(self, other: Prediction) -> Prediction:
        return Prediction(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.nats + other.nats,
        )


def predict(
    model: Decoder,
    text: Text,
    documents: Iterable[str],
    *,
    seq_len: int,
    stride: int | None = None,
    batch_size: int = 8,
    told: Callable[[int], None] = lambda done: None,
) -> Prediction:
    """Score documents, each on its own: none of them reads another.

    Args:
        text: the model's tokenizer.
        seq_len: most tokens that the model reads at once.
        stride: as for `zoo.eval.scoring.windows`.
        batch_size: windows that are worked on at once.
        told: hears after each batch how many windows are done.
    """
    pieces, count, tokens, size = [], 0, 0, 0
    for document in documents:
        count += 1
        size += len(document.encode())
        pieces += list(windows(text.encode_plain(document), text.start, seq_len, stride))
    scores = score(model, pieces, batch_size, told)
    tokens = sum(len(piece.targets) for piece in pieces)
    return Prediction(count, tokens, size, -math.fsum(found.log_likelihood for found in scores))
