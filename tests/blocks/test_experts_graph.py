"""What a GPU runs: torch's grouped product as one graph that shifting loads leave as it is."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from zoo.blocks.moe import MoE


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does it itself
@pytest.mark.parametrize("train", [False, True])
def test_one_graph_for_all_loads(train: bool) -> None:
    """No graph break (`fullgraph` would raise), and one compilation, whatever experts the tokens choose."""
    layer = MoE(32, num_experts=6, top_k=2, d_expert=16, num_shared_experts=1).train(train)
    layer.experts.backend = "grouped_mm"
    layer.to(torch.bfloat16)  # the only dtype that torch traces its grouped product in
    graphs = CompileCounter()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    plain = []
    for favourite in range(4):
        with torch.no_grad():
            layer.router.weight.zero_()[favourite] = 5.0
        x = torch.randn(2, 20, 32, dtype=torch.bfloat16).abs().requires_grad_(train)
        y = compiled(x)
        if train:
            y.sum().backward()
        plain.append((y.detach() - layer(x).detach()).abs().max())
    assert graphs.frame_count == 1
    assert not counters["graph_break"]
    assert max(plain) == 0
