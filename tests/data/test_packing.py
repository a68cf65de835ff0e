"""Packing: a document in a row of others has the loss that it has alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from zoo.blocks.base import Context
from zoo.blocks.linear_loss import IGNORED
from zoo.data.batches import Batches
from zoo.data.packing import packed
from zoo.data.stream import Piece, Stream
from zoo.decoder import Decoder

BOUNDARY = 0
LENGTHS = [1, 2, 7, 40, 3, 90, 5, 30]
"""Of documents with their separators: some longer than the windows and chunks of the twins."""
DENSE = {
    "attention": ["qwen3_0_6b"],
    "windows": ["gemma3_4b"],
    "learned positions": ["gpt2_small"],
    "MLA": ["deepseek_v3", "model.layers='3*dense'"],
    "MLA and multi-token prediction": [
        "deepseek_v3",
        "model.layers='2*dense'",
        "model.mtp.enabled=true",
        "model.mtp.layers=dense",
    ],
    "MLA and an indexer": ["deepseek_v3_2", "model.layers='3*dense'"],
    "Mamba-2": ["nemotron_h_8b"],
    "Mamba-1": ["jamba_v0_1", "model.layers='3*mamba'"],
    "gated delta rule": ["olmo_hybrid_7b"],
    "delta rule with a decay for each channel": ["kimi_linear_48b_a3b", "model.layers='3*linear_dense'"],
    "short convolutions": ["lfm3_1_7b"],
}
SPARSE = {
    "attention": ["qwen3_30b_a3b"],
    "windows and sinks": ["gpt_oss_20b"],
    "chunks of attention": ["llama4_scout_17b_16e"],
    "Mamba-2": ["nemotron_3_nano_30b_a3b"],
    "gated delta rule": ["qwen3_next_80b_a3b"],
}


def twin(name: str, *overrides: str) -> Decoder:
    """A tiny twin in fp64 whose weights are large enough that every part matters."""
    torch.manual_seed(0)
    model = zoo.build(name, "model_scale=tiny", *overrides, dtype=torch.float64)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value += 0.05 * torch.randn_like(value)
    return model.eval()


def row(vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """A row as the loader gives it: inputs and targets [1, s], and where its documents begin and end."""
    random = np.random.default_rng(seed)
    documents = [[*random.integers(1, vocab_size, size=length - 1), BOUNDARY] for length in LENGTHS]
    tokens = np.concatenate([[BOUNDARY], *documents]).astype(np.uint32)
    inputs, targets = Batches(Stream([Piece(tokens)]), batch_size=1, seq_len=len(tokens) - 1, seed=0).batch(0)
    return inputs, targets, [0, *np.cumsum(LENGTHS).tolist()]


def test_context_of_a_row() -> None:
    tokens = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 6]])
    context = packed(tokens, 0)
    assert context.documents is not None
    assert context.documents.tolist() == [[0, 0, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1, 1]]
    assert context.positions.tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]]


def check_documents(model: Decoder, atol: float) -> None:
    """Each document of a row has the loss that it has alone."""
    inputs, targets, bounds = row(model.spec.vocab_size)
    for start, end in pairwise(bounds):
        mine = torch.full_like(targets, IGNORED)
        mine[:, start:end] = targets[:, start:end]
        together = model.loss(inputs, mine, packed(inputs, BOUNDARY))
        alone = model.loss(inputs[:, start:end], targets[:, start:end])
        assert int(together.num_tokens) == int(alone.num_tokens) == end - start
        for item in together.items.keys() & {"cross_entropy", "mtp"}:
            torch.testing.assert_close(together.items[item], alone.items[item], rtol=0, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("what", DENSE)
def test_the_loss_of_each_document_is_its_loss_alone(what: str) -> None:
    model = twin(*DENSE[what])
    assert not model.moe_layers()
    assert (model.mtp is not None) == ("multi-token" in what)
    check_documents(model, 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("what", SPARSE)
def test_experts_do_not_join_documents(what: str) -> None:
    """Routers work in fp32 whatever the model's type: their rounding is all that may differ."""
    check_documents(twin(*SPARSE[what]), 1e-6)


@pytest.mark.parametrize("what", ["attention", "windows", "MLA", "Mamba-2", "gated delta rule"])
def test_gradients_are_those_of_the_documents(what: str) -> None:
    model = twin(*DENSE[what])
    inputs, targets, bounds = row(model.spec.vocab_size)

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([part.flatten() for part in found])

    def summed(logits: Tensor, goals: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), goals.flatten(), reduction="sum")

    together = gradient(summed(model(inputs, packed(inputs, BOUNDARY)), targets))
    alone = [summed(model(inputs[:, a:b]), targets[:, a:b]) for a, b in pairwise(bounds)]
    expected = gradient(torch.stack(alone).sum())
    assert (together - expected).norm() < 1e-6 * expected.norm()  # some norms go back in fp32


def test_unpacked_rows_do_hear_of_their_neighbours() -> None:
    """Else the tests above would show nothing."""
    model = twin("qwen3_30b_a3b")
    inputs, targets, _ = row(model.spec.vocab_size)
    apart, joined = (model.loss(inputs, targets, c).items for c in (packed(inputs, BOUNDARY), Context.of(inputs)))
    assert abs(float(apart["cross_entropy"] - joined["cross_entropy"])) > 1e-4
