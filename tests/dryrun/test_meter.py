"""What a step takes of memory, by plain arithmetic on small tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo.dryrun import ledger
from zoo.dryrun.ledger import Ledger, Segment
from zoo.dryrun.meter import Meter

TOKENS, WIDTH, HIDDEN = 64, 16, 48


def kept(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], fused: bool, discard: bool = False
) -> tuple[int, int, Segment]:
    """Bytes after a forward pass of x [t, d] with w [f, d] and v [d, f], and after a backward pass."""
    with FakeTensorMode():
        x = torch.empty(TOKENS, WIDTH, requires_grad=True)
        w, v = torch.empty(HIDDEN, WIDTH, requires_grad=True), torch.empty(WIDTH, HIDDEN, requires_grad=True)
        meter = Meter(fused, discard, lambda name: name)
        meter.know([x], ledger.OTHER)
        meter.know([w, v], ledger.WEIGHTS)
        for leaf in (x, w, v):
            leaf.register_post_accumulate_grad_hook(lambda leaf: meter.keep(leaf.grad, ledger.GRADIENTS))
        with meter, torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack):
            loss = function(x, w, v).sum()
            held = meter.segment.now[ledger.ACTIVATIONS] + meter.segment.now[ledger.OTHER]
            meter.enter(meter.segment, "backward")
            loss.backward()
            del loss
            meter.watching = False
    return held, meter.segment.total, meter.segment


def squared_relu(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.relu(x @ w.t()).square() @ v.t()


def gated(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return (F.silu(x @ w.t()) * (x @ w.t())) @ v.t()


@pytest.mark.parametrize(
    ("function", "fused", "discard", "hidden"),
    [
        # torch keeps what relu gives, once, and its square
        (squared_relu, False, False, 2),
        # a kernel keeps what goes into it and what comes out; or makes that again
        (squared_relu, True, False, 2),
        (squared_relu, True, True, 1),
        # two products, silu, and the product of these
        (gated, False, False, 4),
        (gated, True, False, 3),
        (gated, True, True, 2),
    ],
)
def test_what_is_kept_of_an_mlp(function: Callable[..., Tensor], fused: bool, discard: bool, hidden: int) -> None:
    held, _, _ = kept(function, fused, discard)
    result = 4  # the loss; what it is the sum of is gone
    assert held == hidden * 4 * TOKENS * HIDDEN + result


def test_nothing_but_gradients_is_left() -> None:
    _, left, _ = kept(gated, True, True)
    assert left == 4 * (TOKENS * WIDTH + 2 * HIDDEN * WIDTH)  # no second one for a matrix that is used twice


def test_products_are_counted_once_in_each_direction() -> None:
    _, _, segment = kept(squared_relu, True, True)
    forward = 2 * 2 * TOKENS * WIDTH * HIDDEN
    assert segment.flops == {"forward": forward, "backward": 2 * forward}


def test_a_kernel_takes_no_memory_of_its_own() -> None:
    with FakeTensorMode(), Meter(True, False, lambda name: name) as meter:
        x = torch.empty(TOKENS, WIDTH)
        before = meter.segment.total
        with meter.kernel([x]) as inside:
            y = (x @ torch.empty(WIDTH, HIDDEN)).exp()
        assert meter.segment.total == before
        assert inside.flops == {"forward": 2 * TOKENS * WIDTH * HIDDEN}
        assert not meter.segment.flops
        z = y @ torch.empty(HIDDEN, 4)  # reads what the kernel has to write
        assert z.shape == (TOKENS, 4)
        assert meter.segment.total == before + 4 * (TOKENS * HIDDEN + TOKENS * 4)


def test_the_peak_of_a_step_is_the_highest_of_its_segments() -> None:
    first, second = Segment(), Segment()
    for change in (10, -4):
        first.change(ledger.OTHER, change)
    for change in (7, -13):
        second.change(ledger.ACTIVATIONS, change)
    made = Ledger()
    made.hold({ledger.WEIGHTS: 100})
    made.add(first, "first", "forward")
    made.add(second, "second", "backward")
    assert (made.peak, made.where, made.total) == (113, "second", 100)
    assert made.phase_peaks == {"forward": 110, "backward": 113}
    assert {kind: nbytes for kind, nbytes in made.at_peak.items() if nbytes} == {
        "weights": 100,
        "other": 6,
        "activations": 7,
    }
