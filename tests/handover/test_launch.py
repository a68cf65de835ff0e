"""`zoo launch`: scripts that run, here with stand-ins of what they start."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from calls import SKYPILOT, bash

from zoo.cli import main
from zoo.config import compose
from zoo.plan.plan import plan
from zoo.plan.question import DEGREES

ASKED = ("qwen3_8b", "h100_8x", "hardware.num_devices=16", "tp=2", "pp=1", "cp=1", "global_batch=64", "seq_len=2048")
"""Two nodes of eight; what is left to search is small."""
SRUN = """#!/usr/bin/env bash
# Runs what comes behind its options once for each node.
while [[ $1 == --* ]]; do
  echo "$1" >> "$SEEN/srun"
  shift
done
for node in 0 1; do
  SLURM_NODEID=$node "$@"
done
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[07-08]" ]] && printf 'node07\\nnode08\\n'
"""
TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$SEEN/torchrun.$SLURM_NODEID"
echo "$MASTER_ADDR" > "$SEEN/address.$SLURM_NODEID"
"""


def launch(path: Path, target: str, *words: str) -> str:
    text = launched(target, *words)
    path.write_text(text)
    path.chmod(0o755)
    return text


@cache
def launched(target: str, *words: str) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "script"
        assert main(["launch", *ASKED, f"target={target}", f"out={path}", *words]) == 0
        assert os.access(path, os.X_OK) == (target != "skypilot")
        return path.read_text()


def torchrun_options(words: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))


def train_words(words: list[str]) -> list[str]:
    return words[words.index("train") + 1 :]


def test_the_command_is_the_plan(tmp_path: Path) -> None:
    launch(tmp_path / "run.sh", "torchrun")
    words = shlex.split(bash(str(tmp_path / "run.sh"), "--dry-run", MASTER_ADDR="first"))
    assert words[0] == "torchrun"
    options = torchrun_options(words)
    assert (options["nnodes"], options["nproc-per-node"], options["rdzv-endpoint"]) == ("2", "8", "first:29500")
    assert words[words.index("-m") + 1 : words.index("-m") + 3] == ["zoo.cli", "train"]
    said = dict(word.split("=", 1) for word in train_words(words))
    made = min(
        (
            plan(*ASKED[:3], tp=2, pp=1, cp=1, global_batch=64, seq_len=2048, recompute=recompute)
            for recompute in ("none", "full")
        ),
        key=lambda made: made.step_time_s,
    )
    assert {name: int(said[f"parallel.{name}"]) for name in DEGREES} == {n: getattr(made.layout, n) for n in DEGREES}
    assert int(said["train.micro_batch"]) == made.micro_batch
    assert (said["train.batch_size"], said["train.seq_len"]) == ("64", "2048")
    assert said["hardware.num_devices"] == "16"


def test_zoo_train_knows_every_setting(tmp_path: Path) -> None:
    launch(tmp_path / "run.sh", "torchrun", "train.steps=7", "optimizer.lr=1e-3")
    words = train_words(shlex.split(bash(str(tmp_path / "run.sh"), "--dry-run", MASTER_ADDR="first")))
    cfg = compose(words)
    assert cfg.parallel.type == "manual"
    assert cfg.parallel.tp == 2
    assert cfg.train.steps == 7
    assert cfg.optimizer.lr == 1e-3
    assert cfg.precision.compute == "bf16"


def test_every_setting_says_who_decided_it(tmp_path: Path) -> None:
    text = launch(tmp_path / "run.sh", "torchrun", "train.steps=7")
    block = text[text.index("ARGUMENTS=(") : text.index("\n)")].splitlines()[1:]
    origins = dict(re.fullmatch(r"  (\S+?)=\S+\s+# (.+)", line).groups() for line in block)  # type: ignore[union-attr]
    assert origins["parallel.tp"] == "user"
    assert origins["parallel.dp"] == "plan"
    assert origins["precision.compute"] == "hardware h100_8x"
    assert origins["hardware.num_devices"] == "user"
    assert origins["train.steps"] == "user"


@pytest.mark.parametrize("target", ["torchrun", "slurm"])
def test_bash_reads_it(tmp_path: Path, target: str) -> None:
    path = tmp_path / "run"
    launch(path, target)
    assert bash("-n", str(path)) == ""


def test_further_settings_follow_the_script(tmp_path: Path) -> None:
    launch(tmp_path / "run.sh", "torchrun")
    assert bash(str(tmp_path / "run.sh"), "--dry-run", "train.seed=3", MASTER_ADDR="a").split()[-1] == "train.seed=3"


def test_one_node_needs_no_address(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    assert main(["launch", "qwen3_8b", "h100_8x", "tp=2", "pp=1", "target=torchrun", f"out={path}"]) == 0
    options = torchrun_options(shlex.split(bash(str(path), "--dry-run")))
    assert (options["nnodes"], options["rdzv-endpoint"]) == ("1", "localhost:29500")


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Two nodes: stand-ins of srun, scontrol and torchrun."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[07-08]"}
    return {"path": str(programs), "SEEN": str(tmp_path), **job}


def test_slurm_starts_one_torchrun_on_each_node(tmp_path: Path, cluster: dict[str, str]) -> None:
    launch(tmp_path / "run.sbatch", "slurm")
    bash(str(tmp_path / "run.sbatch"), "train.seed=3", **cluster)
    seen = [(tmp_path / f"torchrun.{node}").read_text().splitlines() for node in (0, 1)]
    assert seen[0] == seen[1]
    options = torchrun_options(seen[0])
    assert (options["nnodes"], options["nproc-per-node"]) == ("2", "8")
    assert (options["rdzv-endpoint"], options["rdzv-id"]) == ("node07:29500", "41")
    assert [(tmp_path / f"address.{node}").read_text().strip() for node in (0, 1)] == ["node07", "node07"]
    assert seen[0][-1] == "train.seed=3"
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set((tmp_path / "srun").read_text().split())


def test_slurm_dry_run_names_every_node(tmp_path: Path, cluster: dict[str, str]) -> None:
    launch(tmp_path / "run.sbatch", "slurm")
    lines = bash(str(tmp_path / "run.sbatch"), "--dry-run", **cluster).splitlines()
    assert [line.split(":")[0] for line in lines] == ["node 0", "node 1"]
    assert all("--rdzv-endpoint=node07:29500" in line for line in lines)
    assert not list(tmp_path.glob("torchrun.*"))


def test_slurm_stops_where_no_node_is_named(tmp_path: Path, cluster: dict[str, str]) -> None:
    launch(tmp_path / "run.sbatch", "slurm")
    with pytest.raises(AssertionError, match="names no nodes"):
        bash(str(tmp_path / "run.sbatch"), **{**cluster, "SLURM_JOB_NODELIST": "others"})


def test_what_sbatch_reads(tmp_path: Path) -> None:
    text = launch(tmp_path / "run.sbatch", "slurm", "time=1-00:00:00", "partition=big")
    head = text[: text.index("set -euo")].splitlines()
    assert all(line.startswith("#") for line in head)  # sbatch stops reading at the first line that is none
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in head if line.startswith("#SBATCH"))
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "1", "8")
    assert (options["time"], options["partition"]) == ("1-00:00:00", "big")
    assert not any("#" in value for value in options.values())


def test_skypilot_has_every_key(tmp_path: Path) -> None:
    task = yaml.safe_load(launch(tmp_path / "task.yaml", "skypilot"))
    assert set(task) <= set(SKYPILOT["task"])
    assert set(task["resources"]) <= set(SKYPILOT["resources"])
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "H100:8"
    assert all(isinstance(value, str) for value in task["envs"].values())
    assert set(re.findall(r"SKYPILOT_\w+", task["run"])) <= set(SKYPILOT["environment"])


def test_skypilot_prints_its_command(tmp_path: Path) -> None:
    task = yaml.safe_load(launch(tmp_path / "task.yaml", "skypilot"))
    run = tmp_path / "run"
    run.write_text(task["run"])
    assert bash("-n", str(run)) == ""
    job = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_TASK_ID": "sky-1"}
    out = bash(str(run), DRY_RUN="1", **job)
    assert out.startswith("node 1: torchrun --nnodes=2 --nproc-per-node=8 ")
    assert "--rdzv-endpoint=10.0.0.1:29500 --rdzv-id=sky-1" in out


def test_accelerators_are_in_the_catalog() -> None:
    from zoo.handover.skypilot import ACCELERATORS

    assert set(ACCELERATORS.values()) <= set(SKYPILOT["accelerators"])


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *ASKED, "target=slurm", f"out={tmp_path / 'x'}", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("torchrun --nnodes=2 ")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("target=kubernetes out=x", "target: found 'kubernetes'; allowed: torchrun, slurm, skypilot"),
        ("out=x", "target: missing"),
        ("target=slurm", "out: missing"),
        ("target=torchrun out=x time=1:00", "time: found '1:00'; it goes with target=slurm"),
        ("target=torchrun out=x target=slurm", "target: is given twice"),
        ("target=torchrun out=x tp=3", "tp: found 3; must divide the 8 devices"),
        ("target=torchrun out=x precision=fp8", "precision: found 'fp8'; zoo train has fp32, bf16"),
        ("target=torchrun out=x recompute=selective", "recompute: found 'selective'; zoo train cannot"),
        ("target=torchrun out=x optimizer=sgd", "optimizer: found 'sgd'; zoo train has adamw, muon"),
        ("target=torchrun out=x train.seq_len=7", "train.seq_len=7: the plan decides this; give seq_len=... instead"),
        ("target=torchrun out=x train.stepz=7", "train.stepz"),
        ("target=torchrun out=x devices_per_node=3", "devices_per_node: found 3; must divide the 8 devices"),
        ("target=torchrun out=x devices_per_node=x", "devices_per_node: found 'x'; must be a positive integer"),
        ("target=torchrun out=x tokens=1e9", "tokens: found 1000000000.0; zoo launch has no such key"),
        ("target=torchrun out=/dev/null/x", "out: found '/dev/null/x'; it cannot be written"),
    ],
)
def test_mistakes(refused: Callable[..., str], words: str, message: str) -> None:
    assert message in refused("launch", "qwen3_8b", "h100_8x", "pp=1", "cp=1", *words.split())


def test_a_rack_has_several_nodes(refused: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    rack = ["qwen3_8b", "gb300_nvl72", "tp=1", "pp=1", "cp=1", "target=slurm"]
    assert "devices_per_node: missing; a domain of gb300_nvl72 has 72 devices" in refused("launch", *rack, "out=x")
    assert main(["launch", *rack, "devices_per_node=4", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("torchrun --nnodes=18 --nproc-per-node=4 ")


def test_an_unknown_chip_needs_its_name(refused: Callable[..., str], tmp_path: Path) -> None:
    words = ["qwen3_0_6b", "gb300_nvl72", "pp=1", "devices_per_node=4", "target=skypilot", f"out={tmp_path / 't.yaml'}"]
    assert "accelerator: missing; SkyPilot's name of NVIDIA GB300" in refused("launch", *words)
    assert main(["launch", *words, "accelerator=GB300"]) == 0
    assert yaml.safe_load((tmp_path / "t.yaml").read_text())["resources"]["accelerators"] == "GB300:4"
