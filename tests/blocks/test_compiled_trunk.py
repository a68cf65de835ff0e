"""What lies between products, compiled, against plain torch: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.blocks import compiled_trunk
from zoo.blocks.rope import rotate
from zoo.native.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here")


def assert_agree(found: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> None:
    """In fp32 against fp64: values and the gradients of all inputs."""
    results = []
    for function, dtype in ((found, torch.float32), (expected, torch.float64)):
        given = [part.detach().to(dtype).requires_grad_() for part in inputs]
        result = function(*given)
        probe = torch.linspace(-1, 1, result.numel(), dtype=dtype).view_as(result)
        results.append([result.detach(), *torch.autograd.grad((result * probe).sum(), given)])
    for mine, exact in zip(*results, strict=True):
        assert mine.shape == exact.shape
        assert float((mine - exact).abs().max()) <= 4e-6 * float(exact.abs().max()) + 1e-9


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 3, 64), (1, 1, 17), (4, 515)])
def test_rms_norm(shape: tuple[int, ...], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_agree(
            lambda x, w: compiled_trunk.RMSNorm.apply(x, w, 1e-5),
            lambda x, w: F.rms_norm(x, shape[-1:], w, 1e-5),
            torch.randn(shape) * 3,
            torch.randn(shape[-1]),
        )
        assert_agree(
            lambda x: compiled_trunk.RMSNorm.apply(x, None, 1e-5),
            lambda x: F.rms_norm(x, shape[-1:], None, 1e-5),
            torch.randn(shape),
        )
    finally:
        torch.set_num_threads(before)


def test_swiglu() -> None:
    gate, up = torch.randn(3, 5, 37) * 4, torch.randn(3, 5, 37)
    assert_agree(compiled_trunk.SwiGLU.apply, lambda gate, up: F.silu(gate) * up, gate, up)
    extreme = torch.tensor([-1e4, -90.0, 90.0, 1e4])
    torch.testing.assert_close(compiled_trunk.swiglu(extreme, torch.ones(4)), F.silu(extreme), atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (2, 8), (2, 12)])
def test_rotary_positions(layout: str, rows: int, width: int) -> None:
    angles = torch.rand(rows, 7, 4, dtype=torch.float64) * 6
    cos, sin = angles.cos(), angles.sin()
    assert_agree(
        lambda x: compiled_trunk.Turn.apply(x, cos.float(), sin.float(), layout == "interleaved"),
        lambda x: rotate(x, cos, sin, layout),
        torch.randn(2, 7, 3, width),
    )


@pytest.mark.parametrize(
    ("s", "heads", "groups", "d", "dv"), [(1, 2, 2, 8, 8), (95, 4, 2, 16, 16), (97, 2, 1, 24, 20), (700, 3, 3, 64, 48)]
)
def test_causal_attention(s: int, heads: int, groups: int, d: int, dv: int) -> None:
    """Blocks that end in the middle, groups of heads, values of another width than keys."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (part.repeat_interleave(heads // groups, 2) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(1, 2)

    shapes = ((2, s, heads, d), (2, s, groups, d), (2, s, groups, dv))
    inputs = [torch.randn(shape) for shape in shapes]
    assert_agree(lambda q, k, v: compiled_trunk.CausalAttention.apply(q, k, v, 0.3), plain, *inputs)


def test_attention_of_large_scores() -> None:
    """Sums of exponentials are taken from the largest score on; nothing overflows."""
    q = torch.randn(1, 30, 1, 8) * 100
    found = compiled_trunk.CausalAttention.apply(q, q, q, 1.0)
    expected = F.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3, is_causal=True, scale=1.0)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_cross_entropy() -> None:
    logits, targets = torch.randn(11, 519) * 5, torch.randint(519, (11,))
    logits[3] += 1e4
    targets[[2, 7]] = -100
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none", ignore_index=-100)
    (grad,) = torch.autograd.grad(expected.sum(), exact)
    losses = compiled_trunk.cross_entropy_(logits, targets)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), grad, rtol=1e-5, atol=1e-6)
