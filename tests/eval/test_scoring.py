"""Likelihoods against a plain log-softmax over one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.config import load
from zoo.decoder import Decoder, build
from zoo.eval.perplexity import predict
from zoo.eval.scoring import Piece, score, windows


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    spec = load("tiny_moe", "model.d_model=32", "model.layers='2*sparse'", "model.moe.d_expert=16")
    return build(spec, dtype=torch.float64)


def plainly(model: Decoder, piece: Piece) -> tuple[float, bool]:
    row = [*piece.context, *piece.targets]
    with torch.no_grad():
        logits = model(torch.tensor([row]))[0]
    where = range(len(piece.context) - 1, len(row) - 1)
    found = [float(logits[at].log_softmax(-1)[row[at + 1]]) for at in where]
    return sum(found), all(int(logits[at].argmax()) == row[at + 1] for at in where)


def test_scores_are_those_of_each_sequence_alone(model: Decoder) -> None:
    draw = torch.Generator().manual_seed(1)
    lengths = [(1, 5), (7, 1), (3, 12), (2, 2), (9, 4)]
    pieces = []
    for context, targets in lengths:
        row = torch.randint(256, (context + targets,), generator=draw).tolist()
        pieces.append(Piece(row[:context], row[context:]))
    likeliest = int(model(torch.tensor([[65]]))[0, -1].argmax())
    pieces.append(Piece([65], [likeliest]))
    heard: list[int] = []
    scores = score(model, pieces, batch_size=2, told=heard.append)
    assert heard == [2, 4, 6]
    for found, piece in zip(scores, pieces, strict=True):
        expected, greedy = plainly(model, piece)
        # Logits are rounded to fp32 before the softmax.
        assert found.log_likelihood == pytest.approx(expected, rel=1e-5)
        assert found.greedy == greedy
    assert scores[-1].greedy
    assert model.training


@given(count=st.integers(0, 60), length=st.integers(1, 20), data=st.data(), start=st.booleans())
def test_windows_predict_each_token_once_with_all_the_context_that_fits(
    count: int, length: int, data: st.DataObject, start: bool
) -> None:
    stride = data.draw(st.none() | st.integers(1, length))
    ids = list(range(1, count + 1))
    pieces = list(windows(ids, 0 if start else None, length, stride))
    assert [token for piece in pieces for token in piece.targets] == ids[0 if start else 1 :]
    for piece in pieces:
        whole = [*piece.context, *piece.targets]
        assert piece.context
        assert whole == list(range(whole[0], whole[0] + len(whole)))
        assert len(whole) - 1 <= length
        assert whole[0] == (0 if start else 1) or len(whole) - 1 == length


def test_windows_refuse_a_stride_that_leaves_tokens_out() -> None:
    with pytest.raises(ValueError, match="stride 5 with length 4"):
        list(windows([1, 2, 3], 0, 4, 5))


class Letters:
    """A tokenizer of one token a character."""

    ends = (0,)
    start = 0

    def encode_plain(self, text: str) -> list[int]:
        return [ord(char) % 256 for char in text]


def test_a_prediction_adds_up_documents(model: Decoder) -> None:
    texts = ["some words", "others, é"]
    together = predict(model, Letters(), texts, seq_len=64)
    alone = [predict(model, Letters(), [text], seq_len=64) for text in texts]
    assert (together.documents, together.tokens, together.bytes) == (2, 19, 20)
    assert together.nats == pytest.approx(sum(one.nats for one in alone))
    expected, _ = plainly(model, Piece([0], Letters().encode_plain(texts[0])))
    assert alone[0].nats == pytest.approx(-expected, rel=1e-5)
    assert together.bits_per_byte == pytest.approx(together.nats / 20 / math.log(2))
    assert together.perplexity == pytest.approx(math.exp(together.nats / 19))
