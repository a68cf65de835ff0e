"""The trigram baseline against counting with dictionaries, and as a probability model."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data import ngram
from zoo.data.batches import heldout_rows
from zoo.data.ngram import TrigramBaseline

TEXT = np.frombuffer(
    (b"the cat sat on the mat and the dog sat on the log, then they all sat and sang.\0" * 3), np.uint8
)
TOKENS = st.lists(st.integers(0, 5), min_size=64, max_size=300).map(lambda ids: np.array(ids, dtype=np.uint8))


def brute_force(model: TrigramBaseline, train: np.ndarray, history: tuple[int, ...], token: int) -> float:
    """The same probability from dictionaries of the trigrams of `train`."""
    grams = [tuple(int(token) for token in train[i : i + 3]) for i in range(len(train) - 2)]
    probability = 1 / model.vocab_size
    for order in range(1, len(history) + 2):
        context = history[len(history) - order + 1 :]
        total = Counter(gram[3 - order : 2] for gram in grams)[context]
        count = Counter(gram[3 - order :] for gram in grams)[(*context, token)]
        weight = model.weights[order - 1][total.bit_length()]
        probability = weight * (count / total if total else 0.0) + (1 - weight) * probability
    return probability


def test_equals_dictionaries() -> None:
    model = TrigramBaseline.fit(TEXT)
    heldout = np.frombuffer(b"the hog sat\0on zebras", np.uint8)
    ids = heldout.tolist()
    bits = [-math.log2(brute_force(model, TEXT, tuple(ids[max(0, i - 2) : i]), ids[i])) for i in range(1, len(ids))]
    assert model.bits_per_byte(heldout) == pytest.approx(sum(bits) / len(bits), rel=1e-12)


def test_rows_start_anew() -> None:
    model = TrigramBaseline.fit(TEXT)
    rows = heldout_rows(TEXT, 10, 10_000)
    assert model.bits_per_byte(rows) == pytest.approx(np.mean([model.bits_per_byte(row) for row in rows]), rel=1e-12)
    assert model.bits_per_byte(rows) > model.bits_per_byte(TEXT)


@settings(deadline=None)
@given(train=TOKENS, before=st.integers(0, 7), last=st.integers(0, 7))
def test_probabilities_are_positive_and_sum_to_one(train: np.ndarray, before: int, last: int) -> None:
    model = TrigramBaseline.fit(train, vocab_size=8)
    found = model.probabilities(before, last)
    assert found.shape == (8,)
    assert found.min() > 0
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert found[3] == pytest.approx(brute_force(model, train, (before, last), 3), rel=1e-12)
    assert all(((weights >= 0) & (weights < 1)).all() for weights in model.weights)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TrigramBaseline.fit(TEXT)
    expected = whole.bits_per_byte(TEXT), whole.bits_per_byte(heldout_rows(TEXT, 9, 1000))
    monkeypatch.setattr(ngram, "_CHUNK", 7)
    parts = TrigramBaseline.fit(TEXT)
    np.testing.assert_array_equal(parts.probabilities(116, 104), whole.probabilities(116, 104))
    assert (parts.bits_per_byte(TEXT), parts.bits_per_byte(heldout_rows(TEXT, 9, 1000))) == pytest.approx(expected)


def test_knows_the_entropy_of_a_source() -> None:
    """A Markov source of order 2 with 4 symbols: the baseline comes within 1 % of its entropy rate."""
    random = np.random.default_rng(0)
    chances = random.dirichlet([0.5] * 4, size=16)
    tokens, context = [], 0
    for uniform in random.random(60_000):
        token = min(3, int(np.searchsorted(chances[context].cumsum(), uniform)))
        tokens.append(token)
        context = (context * 4 + token) % 16
    train, heldout = np.array(tokens[:40_000], np.uint8), np.array(tokens[40_000:], np.uint8)
    contexts = heldout[:-2].astype(int) * 4 + heldout[1:-1]
    best = -np.log2(chances[contexts, heldout[2:]]).mean()
    assert best < TrigramBaseline.fit(train, vocab_size=4).bits_per_byte(heldout) < best * 1.01


def test_weights_suit_unseen_text() -> None:
    """Noise has no trigrams worth trusting: as good as its unigrams, where counting alone would be far off."""
    random = np.random.default_rng(0)
    train, heldout = random.integers(0, 64, size=(2, 20_000)).astype(np.uint8)
    assert 6 <= TrigramBaseline.fit(train, vocab_size=64).bits_per_byte(heldout) < 6.02


@pytest.mark.parametrize(("tokens", "vocab_size"), [([1] * 63, 256), ([8] * 100, 8), ([1] * 100, 257)])
def test_tokens_that_do_not_fit(tokens: list[int], vocab_size: int) -> None:
    with pytest.raises(ValueError, match=r"do(es)? not fit a table of trigrams"):
        TrigramBaseline.fit(np.array(tokens, dtype=np.uint16), vocab_size)
