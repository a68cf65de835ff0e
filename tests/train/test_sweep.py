"""Sweeps: which jobs there are, where they live, and what is left of them when they are started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import SMALL
from zoo.cli import main
from zoo.config import options_of
from zoo.spec.base import ConfigError
from zoo.spec.run import decode_run
from zoo.train.metrics_file import METRICS, read_metrics
from zoo.train.sweep import claimed, is_sweep, missing, sweep_dir, sweep_of


@pytest.mark.parametrize("name", options_of("sweep"))
def test_every_ready_sweep_makes_sound_jobs_that_differ(name: str) -> None:
    from zoo.config import compose

    jobs = sweep_of([f"sweep={name}"]).jobs
    runs = [decode_run(compose(job)) for job in (jobs[0], jobs[-1])]
    assert len({tuple(job) for job in jobs}) == len(jobs) > 6
    assert runs[0].to_dict() != runs[1].to_dict()


def test_granularity_is_swept_at_the_same_work_per_token() -> None:
    from zoo.config import compose

    runs = [decode_run(compose(job)) for job in sweep_of(["sweep=experts_granularity"]).jobs]
    blocks = [run.model.slots["moe"] for run in runs]
    assert {block.top_k * block.d_expert for block in blocks} == {512}
    assert len({(block.num_experts * block.d_expert, block.top_k) for block in blocks}) == len(blocks)


def test_what_is_typed_counts_more_than_the_ready_sweep() -> None:
    sweep = sweep_of(["sweep=scaling", "train.steps=7"])
    assert len(sweep.jobs) == 6
    assert all("train.steps=7" in job for job in sweep.jobs)
    assert sweep.complete


def test_the_directory_follows_from_the_jobs_alone() -> None:
    words = ["model=tiny_dense,tiny_moe", "optimizer.lr=1e-3,2e-3"]
    plain, parallel = sweep_of(words), sweep_of([*words, "hydra/launcher=basic", "hydra.job.chdir=false"])
    assert plain.jobs == parallel.jobs
    assert sweep_dir(plain.jobs, words) == sweep_dir(parallel.jobs, words)
    assert sweep_dir(plain.jobs[:-1], words) != sweep_dir(plain.jobs, words)
    assert sweep_dir(plain.jobs, ["sweep=scaling"]).name.startswith("scaling-")


def test_a_sweep_is_known_by_flag_mode_or_name() -> None:
    assert all(is_sweep([word]) for word in ("-m", "hydra.mode=MULTIRUN", "sweep=scaling"))
    assert not is_sweep(["model=tiny_moe", "sweep=null"])


def test_two_processes_do_not_take_the_same_job(tmp_path: Path) -> None:
    with claimed(tmp_path) as first:
        assert first
        with claimed(tmp_path) as second:
            assert not second
    with claimed(tmp_path) as third:
        assert third


def test_a_sweep_started_again_does_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to learn from\n" * 400)
    words = [word for word in SMALL if not word.startswith(("data.paths", "optimizer.lr"))]
    words += [f"data.paths={text}", "optimizer.lr=1e-2,2e-2", "train.steps=2"]
    command = [sys.executable, "-m", "zoo.cli", "train", "-m", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert missing(folder) == {}
    ends = {number: read_metrics(folder / number / METRICS)[-1] for number in "01"}
    # As if the second job had been killed before its end.
    records = (folder / "1" / METRICS).read_text().splitlines()
    (folder / "1" / METRICS).write_text("\n".join(records[:-1]) + "\n")
    (folder / "1" / "failed.txt").write_text("killed")
    changed = (folder / "0" / METRICS).stat().st_mtime_ns
    assert missing(folder) == {"1": "killed"}
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert (folder / "0" / METRICS).stat().st_mtime_ns == changed
    assert f"done before: {ends['0']['last_eval']['bits_per_byte']:.4f} bits per byte" in second.stdout
    again = read_metrics(folder / "1" / METRICS)[-1]
    assert again["last_eval"]["loss"] == ends["1"]["last_eval"]["loss"]
    assert not (folder / "1" / "failed.txt").exists()
    assert main(["report", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "2 runs, 2 done" in told
    assert "no scaling law: a law has 5 constants" in told
    assert (folder / "runs.csv").read_text().splitlines()[0].endswith("optimizer.lr")
    assert (folder / "runs.png").stat().st_size > 10_000


def test_another_run_in_the_place_of_a_job_is_refused(tmp_path: Path) -> None:
    from tests.train.runs import small_run
    from zoo.train.provenance import write_provenance
    from zoo.train.sweep import result_of

    run = small_run(tmp_path)
    write_provenance(run, tmp_path)
    (tmp_path / METRICS).write_text(json.dumps({"event": "started", "step": 0}) + "\n")
    assert result_of(tmp_path, run.to_dict()) is None
    other = small_run(tmp_path, "optimizer.lr=5e-2")
    with pytest.raises(ConfigError, match=r"^hydra\.sweep\.dir: .* run of other settings(.|\n)*optimizer\.lr: was"):
        result_of(tmp_path, other.to_dict())
