"""Log-likelihoods of token sequences under a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.blocks.base import Context
from zoo.decoder import Decoder

POSITIONS_AT_ONCE = 1024
"""Rows of logits that are in memory together."""


class Piece(NamedTuple):
    """Tokens to score after tokens that are only read."""

    context: Sequence[int]
    """At least one."""
    targets: Sequence[int]


class Score(NamedTuple):
    """Of the targets of a piece."""

    log_likelihood: float
    """In nats, summed."""
    greedy: bool
    """Whether each target is the likeliest token."""


def windows(ids: Sequence[int], start: int | None, length: int, stride: int | None = None) -> Iterator[Piece]:
    """A document as pieces in which each token is a target exactly once.

    Args:
        ids: the document.
        start: token that stands before it; None: the document's first token is only read.
        length: most tokens that the model reads at once.
        stride: targets of each piece after the first. The smaller, the more each token has before it; None: `length`,
            no token is read twice.
    """
    if not 1 <= (stride or length) <= length:
        raise ValueError(f"stride {stride} with length {length}")
    whole = [*([] if start is None else [start]), *ids]
    first = 1
    while first < len(whole):
        count = min(length if first == 1 else stride or length, len(whole) - first)
        end = first + count
        yield Piece(whole[max(0, end - 1 - length) : first], whole[first:end])
        first = end


@torch.inference_mode()
def score(
    model: Decoder, pieces: Sequence[Piece], batch_size: int = 8, told: Callable[[int], None] = lambda done: None
) -> list[Score]:
    """Score pieces, those of similar length together.

    Args:
        pieces: each with a context of at least one token.
        batch_size: pieces that are worked on at once.
        told: hears after each batch how many pieces are done.

    Returns:
        A score for each piece, in their order.
    """
    was_training = model.training
    model.eval()
    scores: list[Score] = [Score(0.0, True)] * len(pieces)
    order = sorted(range(len(pieces)), key=lambda index: -len(pieces[index].context) - len(pieces[index].targets))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        for index, found in zip(chosen, _score_batch(model, [pieces[index] for index in chosen]), strict=True):
            scores[index] = found
        told(min(first + batch_size, len(order)))
    model.train(was_training)
    return scores


def _score_batch(model: Decoder, pieces: Sequence[Piece]) -> Iterator[Score]:
    rows = [[*piece.context, *piece.targets] for piece in pieces]
    longest = max(map(len, rows))
    # Padded at the right: no token sees what comes after it.
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.embed.weight.device)
    read = tokens[:, :-1]
    hidden = model.hidden(read, Context.of(read))
    for place, piece in enumerate(pieces):
        begin = len(piece.context) - 1
        states = hidden[place, begin : begin + len(piece.targets)]
        wanted = tokens[place, begin + 1 : begin + 1 + len(piece.targets)]
        yield _score_states(model, states, wanted)


def _score_states(model: Decoder, states: Tensor, wanted: Tensor) -> Score:
    """The score of tokens `wanted` [t] after the hidden states [t, d]."""
    total, greedy = 0.0, True
    for part, targets in zip(states.split(POSITIONS_AT_ONCE), wanted.split(POSITIONS_AT_ONCE), strict=True):
        logits = model.logits(part).float()
        total += float(logits.log_softmax(-1).gather(-1, targets[:, None]).sum(dtype=torch.float64))
        greedy &= bool((logits.argmax(-1) == targets).all())
    return Score(total, greedy)
