"""What is not kept for the backward pass is made again: the same gradients from less memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

import zoo
from zoo.blocks.base import Context
from zoo.blocks.sparing import sparing
from zoo.native.library import library

MODELS = ("qwen3_30b_a3b", "llama3_1_8b", "deepseek_v3", "gemma3_27b", "granite4_h_small", "gpt_oss_120b")


def test_views_are_made_again_once_and_let_go() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(3)]
    made = []

    def make() -> Tensor:
        made.append(1)
        return x.detach() * 2

    def loss(y: Tensor) -> Tensor:
        parts = zip((y, y.view(3, 2, 8), y[1:3]), weights, strict=True)
        return torch.stack([(part @ weight).square().sum() for part, weight in parts]).sum()

    y = x * 2
    storage = weakref.ref(y)
    with sparing((y, make)):
        found = loss(y)
    del y
    gc.collect()
    assert storage() is None
    expected = torch.autograd.grad(loss(x * 2), [x, *weights])
    for retain in (True, False):
        for mine, theirs in zip(torch.autograd.grad(found, [x, *weights], retain_graph=retain), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert len(made) == 2


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole step by the compiled kernels, sparing, against the same by torch in fp64."""
    if library() is None:
        pytest.skip("no C++ compiler here")
    torch.manual_seed(0)
    model = zoo.build(zoo.load(name, "model_scale=tiny")).train()
    tokens = torch.randint(model.spec.vocab_size, (2, 80))
    model.loss(tokens, tokens).total.backward()
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.double().zero_grad()
    model.loss(tokens, tokens).total.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (found[key] - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-6)
            assert error < 2e-3, (key, float(error))


def test_only_where_nothing_is_made_again_anyway() -> None:
    model = zoo.build(zoo.load("tiny_dense", "model.layers='2*dense'"))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    for recompute in ("none", "layer"):
        model.recompute = recompute
        context = Context.of(tokens)
        model.hidden(tokens, context)
        assert context.sparing == (recompute == "none")
