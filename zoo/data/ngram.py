"""The order-2 byte model that a language model has to beat."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from zoo.data.stream import Stream
from zoo.data.tokenizer import Tokens

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]

_ORDERS = (1, 2, 3)
_CHUNK = 1 << 20
"""Tokens that are counted or scored at once."""
_HELD_BACK = 32
"""One token in so many fits the weights instead of being counted ..."""
_NUM_RUNS = 32
"""... in so many runs of neighbours, spread evenly: closer to unseen text than single tokens would be."""
_EM_STEPS = 40
_NUM_BUCKETS = 65


class TrigramBaseline:
    """Interpolated trigram, bigram, unigram and uniform probabilities (Jelinek and Mercer 1980).

    P(c | a b) = w n(a b c) / n(a b) + (1 - w) P(c | b), and so on down to the uniform distribution. The weight w
    depends on the context's order and on the power of two of its count (buckets as in Chen and Goodman 1999).
    """

    def __init__(self, trigrams: _Ints, weights: list[_Floats]) -> None:
        vocab_size = round(len(trigrams) ** (1 / 3))
        bigrams = trigrams.reshape(vocab_size, -1).sum(0)
        self.vocab_size = vocab_size
        self._counts = [bigrams.reshape(vocab_size, -1).sum(0), bigrams, trigrams]
        """For each order, how often each gram occurs, by its code: [vocab], [vocab ** 2], [vocab ** 3]."""
        self._totals = [counts.reshape(-1, vocab_size).sum(1) for counts in self._counts]
        """How often each context occurs: [1], [vocab], [vocab ** 2]."""
        self.weights = weights
        """For each order, by bucket of the context's count (0, 1, 2 to 3, 4 to 7, ...)."""

    @classmethod
    def fit(cls, train: Stream | Tokens, vocab_size: int = 256) -> TrigramBaseline:
        """Count `train`; fit the weights on parts of it while these are left out of the counts.

        Args:
            train: A stream, or a one-dimensional array; ids below `vocab_size`, at least 64.
            vocab_size: At most 256; the table of trigrams has vocab_size ** 3 entries of 8 bytes.
        """
        if train.ndim != 1 or len(train) < 2 * _NUM_RUNS or vocab_size > 256:
            raise ValueError(f"{len(train)} tokens do not fit a table of trigrams of {vocab_size} ids")
        trigrams = np.zeros(vocab_size**3, dtype=np.int64)
        for start in range(0, len(train) - 2, _CHUNK):
            part = train[start : start + _CHUNK + 2]
            if part.max() >= vocab_size:
                raise ValueError(f"token {part.max()} does not fit a table of trigrams of {vocab_size} ids")
            np.add.at(trigrams, _codes(part, 3, vocab_size), 1)
        bounds = [run * (len(train) // _NUM_RUNS) + min(run, len(train) % _NUM_RUNS) for run in range(_NUM_RUNS + 1)]
        runs = [train[a : a + max(3, (b - a) // _HELD_BACK)] for a, b in pairwise(bounds)]
        held_back = np.concatenate([_codes(run, 3, vocab_size) for run in runs])
        np.subtract.at(trigrams, held_back, 1)
        weights = cls(trigrams, [])._fit_weights(held_back)
        np.add.at(trigrams, held_back, 1)
        return cls(trigrams, weights)

    def probabilities(self, before: int, last: int) -> _Floats:
        """The distribution of what follows the tokens `before`, `last`: [vocab_size], sums to one."""
        return self._score((before * self.vocab_size + last) * self.vocab_size + np.arange(self.vocab_size), 3)

    def bits_per_byte(self, tokens: Tokens) -> float:
        """Mean of -log2 P over every token but the first of its row, given the one or two before it in that row.

        Args:
            tokens: A stream, or rows as `zoo.data.batches.heldout_rows` cuts them: [len] or [rows, len], len >= 2.
        """
        rows = np.atleast_2d(tokens)
        bits = -np.log2(self._score(_codes(rows[:, :2], 2, self.vocab_size), 2)).sum()
        rows_at_once = max(1, _CHUNK // rows.shape[1])
        for top in range(0, len(rows), rows_at_once):
            for start in range(0, rows.shape[1] - 2, _CHUNK):
                part = rows[top : top + rows_at_once, start : start + _CHUNK + 2]
                bits -= np.log2(self._score(_codes(part, 3, self.vocab_size), 3)).sum()
        return float(bits / (rows.shape[0] * (rows.shape[1] - 1)))

    def _score(self, codes: _Ints, order: int) -> _Floats:
        """P of the last token of each gram of `order` tokens, given the others."""
        result = np.full(len(codes), 1 / self.vocab_size)
        for counts, totals, weights, k in zip(self._counts, self._totals, self.weights, _ORDERS[:order], strict=False):
            gram = codes % self.vocab_size**k
            total = totals[gram // self.vocab_size]
            weight = weights[_bucket(total)]
            result = weight * counts[gram] / np.maximum(total, 1) + (1 - weight) * result
        return result

    def _fit_weights(self, held_back: _Ints) -> list[_Floats]:
        shares, buckets = [], []
        for counts, totals, order in zip(self._counts, self._totals, _ORDERS, strict=True):
            gram = held_back % self.vocab_size**order
            total = totals[gram // self.vocab_size]
            shares.append(counts[gram] / np.maximum(total, 1))
            buckets.append(_bucket(total))
        return _expectation_maximisation(shares, buckets, 1 / self.vocab_size)


def _expectation_maximisation(shares: list[_Floats], buckets: list[_Ints], uniform: float) -> list[_Floats]:
    """Weights that make a sequence of tokens likely (Dempster et al. 1977).

    Args:
        shares: For each order, relative frequency of each token after its context.
        buckets: For each order, the bucket of that context's count.
    """
    weights = [np.where(np.arange(_NUM_BUCKETS) > 0, 0.5, 0.0) for _ in shares]
    for _ in range(_EM_STEPS):
        likelihood = [np.full(len(shares[0]), uniform)]
        for share, bucket, weight in zip(shares, buckets, weights, strict=True):
            likelihood.append(weight[bucket] * share + (1 - weight[bucket]) * likelihood[-1])
        reach = np.ones(len(shares[0]))  # probability that the token was drawn from this order or a lower one
        for k in reversed(range(len(shares))):
            drawn = reach * weights[k][buckets[k]] * shares[k] / likelihood[k + 1]
            weights[k] = _ratio(drawn, reach, buckets[k])
            reach = reach - drawn
    return weights


def _ratio(part: _Floats, whole: _Floats, bucket: _Ints) -> _Floats:
    """Sum of `part` over sum of `whole` in each bucket, with one more hit and one more miss than were seen.

    These keep every probability above zero. A bucket that nothing fell into takes the ratio of the nearest lower one;
    contexts that were never seen have no counts to weigh.
    """
    parts = np.bincount(bucket, part, minlength=_NUM_BUCKETS)
    wholes = np.bincount(bucket, whole, minlength=_NUM_BUCKETS)
    known = np.bincount(bucket, minlength=_NUM_BUCKETS) > 0
    nearest = np.maximum.accumulate(np.where(known, np.arange(_NUM_BUCKETS), 1))
    ratio: _Floats = ((parts + 1) / (wholes + 2))[nearest]
    ratio[0] = 0
    return ratio


def _codes(tokens: Tokens, order: int, vocab_size: int) -> _Ints:
    """Every gram of `order` neighbouring tokens of a row as one number, the last token its lowest digit."""
    rows = np.atleast_2d(tokens)
    count = rows.shape[1] - order + 1
    codes = rows[:, :count].astype(np.int64)
    for shift in range(1, order):
        codes *= vocab_size
        codes += rows[:, shift : shift + count]
    return codes.ravel()


def _bucket(counts: _Ints) -> _Ints:
    return np.frexp(counts.astype(np.float64))[1].astype(np.int64)
