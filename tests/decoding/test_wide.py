"""Products of bf16 in fp32: equal to wider arithmetic rounded once, whatever calls them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.decoding import wide
from zoo.decoding.wide import WideProducts, wide_products
from zoo.native.library import library

CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b: F.linear(x, w),
    "linear_with_bias": lambda x, w, b: F.linear(x, w, b),
    "rows_of_batches": lambda x, w, b: F.linear(x.view(-1, 1, x.shape[1]), w, bias=b)[:, 0],
    "mm": lambda x, w, b: torch.mm(x, w.t(), out=torch.empty(len(x), len(w), dtype=x.dtype)),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "operator": lambda x, w, b: x @ w.mT,
    "turned": lambda x, w, b: torch.mm(x, w.t().contiguous()),
    "einsum": lambda x, w, b: torch.einsum("td,nd->tn", x, w),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("rows", "d", "n"), [(1, 40, 7), (6, 33, 300), (50, 1100, 130)])
def test_products(name: str, rows: int, d: int, n: int, loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if loaded and library() is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(wide, "is_loaded", lambda: loaded)
    x, w, b = (torch.randn(shape).to(torch.bfloat16) for shape in ((rows, d), (n, d), (n,)))
    exact = CALLS[name](x.double(), w.double(), b.double()) if name != "mm" else x.double() @ w.double().t()
    with WideProducts():
        found = CALLS[name](x, w, b)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4 * d**0.5)


@pytest.mark.parametrize("loaded", [False, True])
def test_experts_without_a_row_too(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if loaded and library() is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(wide, "is_loaded", lambda: loaded)
    x, stack = torch.randn(20, 64).to(torch.bfloat16), torch.randn(4, 48, 64).to(torch.bfloat16)
    with WideProducts():
        found = F.grouped_mm(x, stack.mT, offs=torch.tensor([3, 3, 16, 20], dtype=torch.int32))
    expert = torch.tensor([0] * 3 + [2] * 13 + [3] * 4)
    exact = torch.einsum("td,tnd->tn", x.double(), stack.double()[expert])
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3)


def test_attention_and_other_dtypes() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8).to(torch.bfloat16) for _ in range(3))
    x = torch.randn(3, 4)
    with WideProducts():
        found, same = F.scaled_dot_product_attention(q, k, v, is_causal=True), F.linear(x, x)
    exact = F.scaled_dot_product_attention(*(part.double() for part in (q, k, v)), is_causal=True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2**-8)
    assert torch.equal(same, F.linear(x, x))


def test_prompts_take_them_where_they_help(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    for units, given, expected in ((False, weight, True), (True, weight, False), (False, weight.float(), False)):
        monkeypatch.setattr(wide, "has_bf16_units", lambda units=units: units)
        assert isinstance(wide_products(given), WideProducts) is expected


def test_a_model_in_bf16_writes_nearly_what_fp32_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits after a prompt, against the same weights in fp32: no further off than plain bf16 is."""
    torch.manual_seed(0)
    low = zoo.build("tiny_moe", dtype=torch.bfloat16).eval()
    high = zoo.build("tiny_moe").eval()
    high.load_state_dict({name: weight.float() for name, weight in low.state_dict().items()}, strict=False)
    tokens = torch.randint(0, low.spec.vocab_size, (2, 30))
    with torch.no_grad():
        exact, plain = high(tokens), low(tokens).float()
        with WideProducts():
            found = low(tokens).float()
    assert (found - exact).square().mean() < 2 * (plain - exact).square().mean()
    monkeypatch.setattr(wide, "has_bf16_units", lambda: False)
    assert low.generate(tokens, 3).shape == (2, 33)
