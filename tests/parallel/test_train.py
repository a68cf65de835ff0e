"""Whole runs of several processes: what one process learns alone, they learn together, in any layout and after any."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from tests.parallel import train_cases as cases
from tests.parallel.pool import Pool
from tests.parallel.train_cases import Heard
from tests.train.runs import small_run
from zoo.hf.checkpoint import from_pretrained
from zoo.hf.convert import convert
from zoo.parallel.storage import Reader
from zoo.plan.layout import Layout
from zoo.spec.base import ConfigError
from zoo.spec.run import RunSpec
from zoo.train.layouts import shrink
from zoo.train.meeting import agreed
from zoo.train.rundir import TENSORS, find_checkpoints
from zoo.train.torchrun import Launch, check_processes, launched

SETTINGS = [
    "optimizer=adamw",
    "model.moe.router.arithmetic=model",
    "train.batch_size=8",
    "train.eval_every=3",
    "train.eval_tokens=80",  # 5 rows, which no number of processes here divides
    "checkpoint.every=3",
    "checkpoint.keep=4",
]
EP2_FSDP2 = ["parallel=manual", "parallel.dp=4", "parallel.ep=2", "parallel.shard=2"]
ELASTIC = {"TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_RESTART_COUNT": "1"}


def settings(folder: Path, *overrides: str) -> RunSpec:
    return small_run(folder, *SETTINGS, *overrides)


def near(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and all(
        abs(mine - other) <= 1e-9 * abs(other) for mine, other in zip(found, expected, strict=True)
    )


def values(terms: dict[str, float]) -> list[float]:
    return [terms[name] for name in sorted(terms)]


def agrees(found: Heard, expected: Heard) -> bool:
    """What was told, from the first step that was heard of on."""
    steps, reports = len(found.losses), len(found.loads)
    losses = [
        near(values(mine), values(other)) for mine, other in zip(found.losses, expected.losses[-steps:], strict=True)
    ]
    return (
        all(losses)
        and near(found.norms, expected.norms[-steps:])
        and found.loads == expected.loads[-reports:]
        and near(found.evaluations, expected.evaluations[-len(found.evaluations) :])
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder: Path, shared_pool: list[Pool]) -> Heard:
    """What one process learns."""
    (heard,) = shared_pool[0].run(1, cases.fp64_run, settings(folder), folder / "alone")
    assert heard.reason == "done"
    return heard


@pytest.fixture(scope="module")
def together(folder: Path, shared_pool: list[Pool], alone: Heard) -> list[Heard]:
    """The same of four."""
    del alone
    return shared_pool[0].run(4, cases.fp64_run, settings(folder, *EP2_FSDP2), folder / "together")


def test_four_processes_learn_what_one_does(alone: Heard, together: list[Heard], folder: Path) -> None:
    for heard in together:  # every process knows all of it; the first one's reporters are told in a real run
        assert agrees(heard, alone)
    assert len(alone.losses) == 6
    assert [checkpoint.step for checkpoint in find_checkpoints(folder / "together")[0]] == [3, 6]
    assert (folder / "together/checkpoints/step_000003" / TENSORS).is_file()
    assert [bool(heard.sample) for heard in together] == [True, False, False, False]
    assert "layout ep2 dp4 shard2: as given, on 4 processes" in together[0].choices


@pytest.mark.parametrize("degrees", [["parallel.tp=2"], ["parallel.pp=2"]], ids=str)
def test_weights_that_no_process_has_whole_start_the_same(
    degrees: list[str], folder: Path, alone: Heard, pool: Pool
) -> None:
    run = settings(folder, "train.steps=2", "schedule=constant", "train.sample_tokens=4", "parallel=manual", *degrees)
    name = f"large_{degrees[0]}"
    for heard in pool.run(2, cases.fp64_run, run, folder / name, None, large=True):
        assert near(values(heard.losses[0]), values(alone.losses[0]))
        assert not heard.sample  # for which one process would need all of it


def from_step_3(folder: Path, name: str) -> Path:
    """A run that has come to step 3."""
    copy = folder / name
    shutil.copytree(folder / "together", copy)
    shutil.rmtree(copy / "checkpoints/step_000006")
    return copy


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, []),
        (2, []),
        (2, ["parallel=manual", "parallel.tp=2"]),
        (2, ["parallel=manual", "parallel.pp=2"]),
        (4, ["checkpoint.asynchronous=true", *EP2_FSDP2]),
    ],
)
def test_another_number_of_processes_goes_on(
    processes: int, overrides: list[str], folder: Path, alone: Heard, together: list[Heard], pool: Pool
) -> None:
    run_dir = from_step_3(folder, f"on_{processes}_{len(overrides)}_{hash(str(overrides))}")
    run = settings(folder, "checkpoint.resume=auto", *overrides)
    for heard in pool.run(processes, cases.fp64_run, run, run_dir):
        assert heard.first_step == 3
        assert len(heard.losses) == 3
        assert agrees(heard, alone)
        if processes == 2 and not overrides:
            assert any("the planner's, on 2 processes" in choice for choice in heard.choices)
        if processes == 4:  # as they were, to the last bit
            assert heard.losses == together[0].losses[3:]
    assert [checkpoint.step for checkpoint in find_checkpoints(run_dir)[0]] == [3, 6]


def test_what_is_left_after_a_loss_goes_on_with_the_same_settings(
    folder: Path, alone: Heard, together: list[Heard], pool: Pool
) -> None:
    run_dir = from_step_3(folder, "shrunk")
    run = settings(folder, "checkpoint.resume=auto", *EP2_FSDP2)
    for heard in pool.run(2, cases.fp64_run, run, run_dir, ELASTIC):
        assert heard.first_step == 3
        assert agrees(heard, alone)
        assert any("2 of 4 processes are left" in choice for choice in heard.choices)


@pytest.mark.parametrize(
    ("given", "processes", "left"),
    [
        (["parallel.dp=8", "parallel.ep=4", "parallel.shard=4"], 4, "ep4 dp4 shard4"),
        (["parallel.dp=8", "parallel.ep=4", "parallel.shard=4"], 2, "ep2 dp2 shard2"),
        (["parallel.dp=4", "parallel.tp=2", "parallel.ep=2"], 6, "tp2 ep2 dp3"),
        (["parallel.dp=4", "parallel.tp=2"], 3, None),
        (["parallel.dp=4", "parallel.ep=2"], 1, "one device"),
    ],
)
def test_data_parallelism_shrinks(given: list[str], processes: int, left: str | None, tmp_path: Path) -> None:
    run = small_run(tmp_path, "parallel=manual", *given)
    layout = shrink(run, Layout(**run.parallel.degrees), processes)
    assert (None if layout is None else str(layout)) == left


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["parallel=manual", "parallel.dp=4"], 2, r"parallel: found dp=4, so that .* is 4; there are 2 processes"),
        (["parallel=manual", "parallel.dp=4"], 1, r"there is 1 process; start as many \(torchrun --nproc-per-node 4"),
        (["parallel=manual"], 2, "found all degrees 1"),
        (["hardware.num_devices=8"], 4, "hardware.num_devices: found 8; there are 4 processes"),
        (["hardware.num_devices=8"], 1, "hardware.num_devices: found 8; there is 1 process"),
        (["checkpoint.asynchronous=true"], 1, "checkpoint.asynchronous: found True"),
    ],
)
def test_another_number_of_processes_is_refused(
    overrides: list[str], processes: int, message: str, tmp_path: Path
) -> None:
    run = small_run(tmp_path, *overrides)
    with pytest.raises(ConfigError, match=message):
        check_processes(run, processes)
    check_processes(run, processes, shrunk=True)


def test_torchrun_says_who_a_process_is() -> None:
    assert launched({}) is None
    words = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node"}
    assert launched(words) == Launch(5, 8, 1, 4)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": "29500", "TORCHELASTIC_MAX_RESTARTS": "3"}
    found = launched(words | agent)
    assert found is not None
    assert found.store == ("node", 29500)
    assert found.elastic


def test_a_checkpoint_of_four_processes_is_exported_tensor_by_tensor(
    folder: Path, together: list[Heard], tmp_path: Path
) -> None:
    done = convert(folder / "together", tmp_path / "export", to="zoo")
    with Reader(folder / "together/checkpoints/step_000006") as reader:
        names = [name for name in reader.index if "/" not in name]
        assert done.num_tensors == len(names)
        model = from_pretrained(tmp_path / "export")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, reader.read(name))


def test_each_attempt_has_a_word_of_its_own() -> None:
    """Its processes all know it, though the store still holds what those before them have said."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def agree(rank: int, size: int) -> str:
        client = TCPStore("127.0.0.1", server.port, is_master=False)
        return agreed(Launch(rank, size, rank, size), client)

    words = []
    for size in (3, 3, 2, 3):
        with ThreadPoolExecutor(size) as threads:
            found = set(threads.map(agree, range(size), [size] * size))
        assert len(found) == 1
        words += found
    assert len(set(words)) == 4
