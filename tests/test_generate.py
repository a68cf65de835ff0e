"""Writing text: greedy, drawn, stopped, padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import small_model, tokens
from zoo.generate import _Sampler

F64 = torch.float64


def test_greedy_text_is_what_whole_passes_give() -> None:
    model, ids = small_model(F64), tokens(3, 5)
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat((expected, model.eval()(expected)[:, -1:].argmax(-1)), 1)
    model.train()
    assert torch.equal(model.generate(ids, 8), expected)
    assert model.training


def test_left_padding_changes_nothing() -> None:
    model, ids = small_model(F64), tokens(3, 6)
    padding = torch.tensor([0, 4, 2])
    found = model.generate(ids, 7, padding=padding)
    for row, start in enumerate(padding.tolist()):
        assert torch.equal(found[row, start:], model.generate(ids[row : row + 1, start:], 7)[0])


def test_a_row_ends_at_its_stop_token() -> None:
    model, ids = small_model(F64), tokens(4, 5)
    free = model.generate(ids, 12)
    stop = int(free[0, 8])
    found = model.generate(ids, 12, stop=[stop])
    for row in range(4):
        new = free[row, 5:].tolist()
        if stop in new:
            end = 5 + new.index(stop)
            assert torch.equal(found[row, : end + 1], free[row, : end + 1])
            assert (found[row, end:] == stop).all()
        else:
            assert torch.equal(found[row], free[row])


def test_all_rows_stopped_ends_early() -> None:
    model, ids = small_model(F64), tokens(1, 5)
    stop = int(model.generate(ids, 1)[0, -1])
    assert model.generate(ids, 50, stop=[stop]).shape == (1, 6)


def test_draws_follow_the_generator_and_zero_tokens_are_none() -> None:
    model, ids = small_model(), tokens(2, 4)
    one, same, other = (
        model.generate(ids, 9, temperature=2.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(model.generate(ids, 0), ids)


def draws(logits: torch.Tensor, **options: float | int | None) -> torch.Tensor:
    """Shares of each token over many draws."""
    chosen = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    sampler = _Sampler(**chosen, generator=torch.Generator().manual_seed(0))
    return sampler(logits.expand(40_000, -1)).bincount(minlength=logits.shape[-1]) / 40_000


LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0, -1.0]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_logits(temperature: float) -> None:
    torch.testing.assert_close(
        draws(LOGITS, temperature=temperature), (LOGITS[0] / temperature).softmax(-1), rtol=0, atol=0.01
    )


def test_top_k_and_top_p_draw_among_the_likeliest() -> None:
    kept = torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf, -torch.inf]).softmax(-1)
    torch.testing.assert_close(draws(LOGITS, top_k=2), kept, rtol=0, atol=0.01)
    shares = LOGITS[0].softmax(-1)
    between = float(shares[1] + shares[2] / 2)  # one token is not enough, two are
    torch.testing.assert_close(draws(LOGITS, top_p=between), kept, rtol=0, atol=0.01)
    assert draws(LOGITS, top_p=0.01)[1] == 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_the_nucleus_is_the_smallest_that_reaches_top_p(values: list[float], top_p: float) -> None:
    logits = torch.tensor([values])
    kept = _Sampler._nucleus(logits, top_p)[0] > -torch.inf
    shares = logits[0].double().softmax(-1)
    assert shares[kept].sum() >= top_p - 1e-5
    least = shares[kept].min()
    assert shares[kept].sum() - least < top_p + 1e-5
    assert (shares[~kept] <= least + 1e-9).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or above, found -1.0"),
        ({"top_k": 0}, "top_k must be 1 or above"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or above"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model().generate(tokens(1, 2), **{"max_new_tokens": 1, **options})


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        small_model().generate(torch.zeros(1, 0, dtype=torch.int64), 3)
