"""A checkpoint of one layout, read by others: training goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.parallel import checkpoint_cases as cases
from tests.parallel.pool import Pool
from zoo.parallel.storage import Reader
from zoo.plan.layout import Layout
from zoo.spec.base import ConfigError
from zoo.train.rundir import TENSORS, checkpoint_dir

WRITER = Layout(dp=4, ep=2, shard=2)
READERS = [WRITER, None, Layout(dp=2, tp=2, ep=2, etp=2, shard=2)]
MORE = [
    Layout(dp=2),
    Layout(dp=2, ep=2, shard=2),
    Layout(tp=2),
    Layout(pp=2),
    Layout(dp=8, ep=4, shard=4),
    Layout(dp=4, tp=2, ep=4, shard=2),
    Layout(tp=4, ep=2, etp=2),
    Layout(dp=2, tp=2, pp=2, ep=2),
]
ALL = bool(os.environ.get("ZOO_ALL_LAYOUTS"))


def fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


def distance(found: cases.State, expected: cases.State) -> float:
    """Of the losses, relative."""
    pairs = [
        (mine[term], value) for mine, other in zip(found[0], expected[0], strict=True) for term, value in other.items()
    ]
    return max(abs(mine - value) / abs(value) for mine, value in pairs)


def same(found: cases.State, expected: cases.State) -> bool:
    held = found[1].keys() == expected[1].keys() and all(
        np.array_equal(found[1][name], value) for name, value in expected[1].items()
    )
    return found[0] == expected[0] and held


@pytest.mark.parametrize("name", ["mla_moe", *(["moe", "hybrid"] if ALL else [])])
@pytest.mark.parametrize("optimizer", [cases.ADAMW, cases.MUON], ids=lambda spec: spec.type)
def test_any_layout_goes_on_from_four_processes(
    name: str, optimizer: cases.OptimizerSpec, pool: Pool, tmp_path: Path
) -> None:
    folder = fresh(tmp_path / "written")
    expected = pool.run(4, cases.write, name, WRITER, optimizer, folder)
    for layout in (*READERS, *(MORE if ALL else [])):
        if name == "hybrid" and layout is not None and layout.tp > 2:  # it has two groups of states
            continue
        found = pool.run(1 if layout is None else layout.num_devices, cases.read, name, layout, optimizer, folder)
        assert max(distance(mine, expected[0]) for mine in found) <= 1e-9, layout
        if layout == WRITER:
            assert all(same(mine, other) for mine, other in zip(found, expected, strict=True))


def test_experts_cut_along_their_width_are_written_in_two_boxes(pool: Pool, tmp_path: Path) -> None:
    folder = fresh(tmp_path / "written")
    layout = Layout(tp=4, ep=2, etp=2)
    expected = pool.run(4, cases.write, "mla_moe", layout, cases.ADAMW, folder)
    index = json.loads((folder / TENSORS).read_text())
    # Two groups of experts, two parts of their widths, gate and up rows apart.
    assert len(index["layers.1.ffn.experts.gate_up"]["pieces"]) == 8
    for reader in (None, WRITER):
        found = pool.run(4 if reader else 1, cases.read, "mla_moe", reader, cases.ADAMW, folder)
        assert max(distance(mine, expected[0]) for mine in found) <= 1e-9


def test_a_single_process_and_several_read_what_the_other_wrote(pool: Pool, tmp_path: Path) -> None:
    (expected,) = pool.run(1, cases.write_alone, "mla_moe", cases.ADAMW, tmp_path)
    written = checkpoint_dir(tmp_path, cases.BEFORE)
    for found in pool.run(4, cases.read, "mla_moe", WRITER, cases.ADAMW, written):
        assert distance(found, expected) <= 1e-9


def test_names_shapes_and_numbers_are_those_of_a_model_that_was_never_cut(pool: Pool, tmp_path: Path) -> None:
    pool.run(1, cases.write_alone, "mla_moe", cases.ADAMW, tmp_path)
    folder = fresh(tmp_path / "written")
    pool.run(4, cases.write, "mla_moe", WRITER, cases.ADAMW, folder)
    alone = checkpoint_dir(tmp_path, cases.BEFORE)
    expected = load_file(alone / "model.safetensors") | load_file(alone / "optimizer.safetensors")
    with Reader(folder) as reader:
        assert reader.index.keys() == expected.keys()
        for name, tensor in expected.items():
            found = reader.read(name)
            assert found.shape == tensor.shape
            assert found.dtype == tensor.dtype
            torch.testing.assert_close(found, tensor, rtol=1e-9, atol=1e-12)
    # Every process has written, each number once.
    files = list(folder.glob("rank_*.safetensors"))
    assert len(files) == 4
    assert sum(tensor.numel() for file in files for tensor in load_file(file).values()) == sum(
        tensor.numel() for tensor in expected.values()
    )


def test_another_number_of_experts_is_refused(pool: Pool, tmp_path: Path) -> None:
    folder = fresh(tmp_path / "written")
    pool.run(4, cases.write, "mla_moe", WRITER, cases.ADAMW, folder)
    for message in pool.run(2, cases.refusal, "mla_moe", folder, {"num_experts": 16}):
        assert "layers.1.ffn.experts.gate_up: found shape [8, " in message
        assert "8 experts there, 16 here" in message


@pytest.mark.parametrize(
    "text",
    ["[]", '{"a": {}}', '{"a": {"dtype": "F32", "shape": [4], "pieces": [[[0], [4], "../x", 0]]}}', "{"],
)
def test_an_unsound_index_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / TENSORS).write_text(text)
    with pytest.raises(ConfigError, match="not the index of a checkpoint"):
        Reader(tmp_path)
