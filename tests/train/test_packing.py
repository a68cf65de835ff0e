"""Runs on packed rows: training and evaluation count each document as if it stood alone."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.runs import Listener, small_run
from zoo.decoder import Decoder
from zoo.spec.run import RunSpec
from zoo.train import loop

DENSE = ("+model.mlp={type: mlp, d_ffn: 64}", "model.kinds.sparse.ffn=mlp", "~model.moe")


pytestmark = pytest.mark.usefixtures("known_machine")


def run_on_short_texts(folder: Path, *overrides: str) -> RunSpec:
    """A run whose rows hold several documents each."""
    draw, path = random.Random(0), folder / "texts.jsonl"
    texts = [" ".join(draw.choices("in for x class brown".split(), k=draw.randint(1, 5))) for _ in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = small_run(folder, "train.seq_len=48", *DENSE, *overrides)
    return run.replace(data=run.data.replace(paths=(str(path),), heldout_fraction=0.3))


@torch.no_grad()
def loss_of_documents(model: Decoder, inputs: Tensor, targets: Tensor, boundary: int) -> float:
    """The mean over all targets of rows [b, s] whose documents are passed one by one."""
    total, num_targets, num_documents = 0.0, 0, 0
    for row, goals in zip(inputs, targets, strict=True):
        starts = sorted({0, *torch.where(row == boundary)[0].tolist(), len(row)})
        for start, end in pairwise(starts):
            losses = model.loss(row[None, start:end], goals[None, start:end])
            total += float(losses.items["cross_entropy"]) * int(losses.num_tokens)
            num_targets += int(losses.num_tokens)
            num_documents += 1
    assert num_documents > 2 * len(inputs)
    return total / num_targets


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_losses_of_a_run_are_those_of_its_documents(tmp_path: Path, packing: str) -> None:
    heard = Listener()
    run = run_on_short_texts(tmp_path, f"train.packing={packing}", "train.micro_batch=2", "optimizer.lr=0.3")
    session = loop.Session(run, tmp_path / "run", [heard])
    model, boundary = session.parts.model, session.parts.corpus.boundary
    for _ in range(3):  # the first steps move the weights far from where all tokens are alike
        alone = loss_of_documents(model, *session.batches.batch(session.step), boundary)
        session._train_step()
    session._evaluate()
    heldout = loss_of_documents(model, *session.windows, boundary)
    if packing == "documents":
        assert heard.steps[-1].loss == pytest.approx(alone, rel=1e-5)
        assert heard.evaluations[-1].loss == pytest.approx(heldout, rel=1e-5)
    else:  # else the lines above would show nothing
        assert abs(heard.steps[-1].loss - alone) > 1e-3
        assert abs(heard.evaluations[-1].loss - heldout) > 1e-3
