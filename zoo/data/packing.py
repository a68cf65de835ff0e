"""Rows of several documents, each read as if it stood alone."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.blocks.base import Context


def packed(tokens: Tensor, boundary: int) -> Context:
    """The context in which no document of a row hears of another, and each counts its positions from 0.

    A document begins at the token `Corpus.boundary`: the tokenizer's `begin`, or else the separator, which is then
    both the end that a document learns to write and the place from which the next one starts. So every token is a
    target once, the first of a document too, and generation starts from what training started from. What a row begins
    with, in the middle of a document, counts as a document of its own.

    Args:
        tokens: [b, s] int64, on any device.
    """
    begins = tokens == boundary
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    starts = torch.where(begins, places, 0).cummax(1).values
    return Context(places - starts, documents=begins.cumsum(1))
