"""What holds for every recurrent sequence mixer: cached, padded, packed and low-precision passes against whole ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.blocks.base import Context, Mixer, initialize

PIECES = [[11], [1] * 11, [4, 1, 1, 5], [6, 5]]
"""Ways to cut 11 tokens into passes."""


def started(block: Mixer) -> Mixer:
    """The block in fp64 with weights large enough that every part matters, convolution biases among them."""
    block = block.double()
    initialize(block, 0.3, 0.3)
    return block


def in_pieces(block: Mixer, x: Tensor, pieces: Sequence[int], padding: Tensor | None = None) -> Tensor:
    """x [b, s, d] in several passes that continue one state."""
    state, past, results = block.new_state(x.shape[0], x.shape[1], x.device, x.dtype), 0, []
    for piece in x.split(list(pieces), 1):
        positions = torch.arange(past, past + piece.shape[1])[None]
        if padding is not None:
            positions = (positions - padding[:, None]).clamp_min(0)
        results.append(block(piece, Context(positions, past, padding), state))
        past += piece.shape[1]
    return torch.cat(results, 1)


def check_cached(block: Mixer, pieces: Sequence[int]) -> None:
    """Passes in pieces give what one pass gives."""
    x = torch.randn(2, 11, block.d_model, dtype=torch.float64)
    torch.testing.assert_close(in_pieces(block, x, pieces), block(x), rtol=0, atol=1e-9)


def check_left_padding(block: Mixer, pieces: Sequence[int]) -> None:
    """Whatever stands in the padding, a row gives what it gives alone; with a state and without one."""
    padding = torch.tensor([0, 3, 7])
    x = 3 * torch.randn(3, 11, block.d_model, dtype=torch.float64)
    positions = (torch.arange(11)[None] - padding[:, None]).clamp_min(0)
    for y in (in_pieces(block, x, pieces, padding), block(x, Context(positions, padding=padding))):
        for row, start in enumerate(padding.tolist()):
            torch.testing.assert_close(y[row, start:], block(x[row, None, start:])[0], rtol=0, atol=1e-9)


def check_documents(block: Mixer) -> None:
    """Documents of a row give what they give alone, and one does not hear of another, forward or backward."""
    lengths = [1, 6, 4]
    x = torch.randn(1, 11, block.d_model, dtype=torch.float64, requires_grad=True)
    documents = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    y = block(x, Context(positions, documents=documents))
    expected = torch.cat([block(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    weights = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(result, x, weights)[0] for result in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    changed = x.detach().clone()
    changed[:, :7] += 1
    assert torch.equal(block(changed, Context(positions, documents=documents))[:, 7:], y[:, 7:])


def check_selected_rows(block: Mixer) -> None:
    """A state goes on with the rows of it that are chosen."""
    x, rows = torch.randn(3, 6, block.d_model, dtype=torch.float64), torch.tensor([2, 0])
    state = block.new_state(3, 6, x.device, x.dtype)
    block(x[:, :5], Context.of(x[:, :5]), state)
    state.select(rows)
    found = block(x[rows, 5:], Context(torch.tensor([[5]]), 5), state)
    torch.testing.assert_close(found, block(x)[rows, 5:], rtol=0, atol=1e-9)


def check_every_weight_learns(block: Mixer) -> None:
    """The loss depends on every parameter."""
    block(torch.randn(2, 7, block.d_model, dtype=torch.float64)).square().sum().backward()
    assert [key for key, weight in block.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def check_low_precision(block: Mixer) -> None:
    """bf16 weights and autocast give nearly what fp32 gives, in bf16, with states in fp32."""
    block, x = block.float(), torch.randn(2, 20, block.d_model)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(x)
    low = block.bfloat16()(x.bfloat16())
    cached = in_pieces(block, x.bfloat16(), [12, 1, 7])
    for found in (mixed, low, cached):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).square().mean().sqrt() < 0.02 * expected.std()
    assert block.new_state(1, 1, x.device, torch.bfloat16).memory.dtype == torch.float32
