"""Random processes of a run are killed at random moments, and the run ends as if nothing had happened.

    python -m benchmarks.rank_kills                    20 kills, 4 processes, 200 steps
    python -m benchmarks.rank_kills --kills 5 --set checkpoint.asynchronous=true

torch's own elastic agent starts the processes of `zoo train` again, as `torchrun --max-restarts` does. Here they are
forked from one that has imported torch, so that a restart takes a second and not ten. Held against a run that nobody
disturbs: every loss, gradient norm and evaluation, bit by bit, and the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Row

RUN = [
    "model=tiny_moe",
    "model.d_model=32",
    "model.layers='2*sparse'",
    "model.moe.d_expert=32",
    "data=files",
    "data.paths=text.txt",
    "hardware=cpu",
    "precision=fp32",
    "optimizer=adamw",
    "train.batch_size=8",
    "train.seq_len=16",
    "train.eval_every=50",
    "train.eval_tokens=64",
    "train.sample_tokens=0",
    "checkpoint.every=5",
    "parallel=manual",
]
LAYOUTS = {
    2: ["parallel.dp=2", "parallel.ep=2", "parallel.shard=2"],
    4: ["parallel.dp=4", "parallel.ep=2", "parallel.shard=2"],
}
PRELOADED = ["hydra", "torch._dynamo", "zoo.train.distributed", "zoo.train.loop", "zoo.train.run"]
"""What takes long to import."""


@dataclass
class Kills:
    """Kills a random process after each start, so many times: one time in three while they start, else somewhere in the
    steps that they then do."""

    folder: Path
    count: int
    random: random.Random
    startup_s: float = 0.0
    steps: int = 0
    """Of the run."""
    step_s: float = 0.0
    done: list[str] = field(default_factory=list)
    """What was hit, in words."""
    over: bool = False

    def watch(self) -> None:
        """Until the run is over."""
        attempt = 1
        while not self.over and len(self.done) < self.count:
            if len(pids(self.folder).get(attempt, ())) < 2:
                time.sleep(0.02)
                continue
            self._wait()
            rank, pid = self.random.choice(sorted(pids(self.folder)[attempt].items()))
            writing = any((self.folder / "run/checkpoints").glob(".*.partial"))
            if not self.over and _kill(pid):
                self.done.append(f"rank {rank}{' while a checkpoint was written' if writing else ''}")
            attempt += 1

    def _wait(self) -> None:
        if self.random.random() < 1 / 3:
            time.sleep(self.random.uniform(0.0, self.startup_s))
            return
        before = self._num_records()
        ahead = self.random.randint(1, max(1, 2 * self.steps // self.count - 1))
        while not self.over and self._num_records() < before + ahead:
            time.sleep(0.01)
        time.sleep(self.random.uniform(0.0, 2 * self.step_s))

    def _num_records(self) -> int:
        """Steps on record; the run forgets those after the checkpoint that it goes on from."""
        path = self.folder / "run/metrics.jsonl"
        return path.read_bytes().count(b'"event": "step"') if path.exists() else 0


def pids(folder: Path) -> dict[int, dict[int, int]]:
    """Processes by attempt and rank."""
    found: dict[int, dict[int, int]] = {}
    for path in folder.glob("pids/*"):
        attempt, rank, pid = path.name.split("_")
        found.setdefault(int(attempt), {})[int(rank)] = int(pid)
    return found


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def work(folder: str, arguments: list[str]) -> None:
    """One process: `zoo train`, its words in a file."""
    os.chdir(folder)
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1, os.environ["RANK"]
    output = os.open(f"output_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    Path("pids", f"{attempt}_{rank}_{os.getpid()}").touch()
    from zoo.train.run import main

    try:
        main(arguments, "zoo train")
    except SystemExit as end:
        Path("statuses", f"{attempt}_{rank}").write_text(str(end.code))
        if end.code:
            sys.stderr.flush()
            os._exit(int(end.code))


def launch(folder: Path, processes: int, arguments: Sequence[str], max_restarts: int) -> None:
    """Run to the end, in `folder`."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    for name in ("pids", "statuses"):
        (folder / name).mkdir(parents=True)
    _text(folder / "text.txt")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.1,
        start_method="forkserver",
    )
    elastic_launch(config, work)(str(folder), [*RUN, *LAYOUTS[processes], "hydra.run.dir=run", *arguments])


def trial(folder: Path, processes: int, arguments: Sequence[str], killer: Kills) -> list[tuple[Any, ...]]:
    """One run with its kills; what it has told at its end."""
    thread = threading.Thread(target=killer.watch)
    thread.start()
    try:
        launch(folder, processes, arguments, max_restarts=killer.count + 1)
    finally:
        killer.over = True
        thread.join()
    return told(folder / "run")


def told(run_dir: Path) -> list[tuple[Any, ...]]:
    """What a run has learned, step by step; all of it is in the metrics file once."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [(r["step"], r["losses"], r["grad_norm"], r["routing"]) for r in records if r["event"] == "step"]
    return [*steps, *((r["step"], r["loss"]) for r in records if r["event"] == "evaluated")]


def times_of(folder: Path) -> tuple[float, float]:
    """How long the processes of an undisturbed run took to start, and how long the steps took."""
    first = min(path.stat().st_mtime for path in folder.glob("pids/*"))
    last = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    return (folder / "run/config.yaml").stat().st_mtime - first, float(last["train_time_s"])


def last_weights(run_dir: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint, as bytes."""
    from zoo.parallel.storage import Reader
    from zoo.train.rundir import newest_checkpoint

    with Reader(newest_checkpoint(run_dir).path) as reader:
        return {name: reader.read(name).numpy().tobytes() for name in reader.index}


def passed_over(folder: Path) -> list[str]:
    """Checkpoints that a restart found in disorder."""
    lines = [line for path in folder.glob("output_*.txt") for line in path.read_text().splitlines()]
    return [line for line in lines if "passed over" in line or "ALERT" in line]


def _text(path: Path) -> None:
    words = random.Random(0).choices("abstract brown class def for in return self x y".split(), k=3000)
    path.write_text(" ".join(words))


@dataclass
class Found:
    """What came of a run with kills beside one without."""

    killer: Kills
    records: int
    same_records: bool
    same_weights: bool
    disorder: list[str]
    final_loss: float
    calm_s: float
    killed_s: float

    @property
    def good(self) -> bool:
        return self.same_records and self.same_weights and not self.disorder


def measure(root: Path, processes: int, steps: int, kills: int, seed: int, further: Sequence[str] = ()) -> Found:
    """Both runs, in `root`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = [f"train.steps={steps}", *further]
    start = time.perf_counter()
    calm = Kills(root / "undisturbed", 0, random.Random(0))
    expected = trial(calm.folder, processes, arguments, calm)
    calm_s = time.perf_counter() - start
    startup_s, train_s = times_of(calm.folder)
    killer = Kills(root / "killed", kills, random.Random(seed), startup_s, steps, train_s / steps)
    start = time.perf_counter()
    found = trial(killer.folder, processes, arguments, killer)
    return Found(
        killer,
        len(expected),
        found == expected,
        last_weights(root / "killed/run") == last_weights(root / "undisturbed/run"),
        passed_over(root / "killed"),
        found[-1][1],
        calm_s,
        time.perf_counter() - start,
    )


def rows(kills: int = 20, steps: int = 200) -> list[Row]:
    """One row."""
    with tempfile.TemporaryDirectory() as root:
        found = measure(Path(root), 4, steps, kills, seed=0)
    what = f"{kills} kills of random processes of 4 in a run of {steps} steps"
    ours = f"{len(found.killer.done)} kills, {'equal bit by bit' if found.good else 'DIFFERS'}"
    return [Row(what, ours, f"bar {kills}", len(found.killer.done) / kills * found.good)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4, choices=sorted(LAYOUTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="further settings of zoo train")
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="zoo_rank_kills_"))
    found = measure(root, given.processes, given.steps, given.kills, given.seed, given.set)
    hits = found.killer.done
    writing = sum("written" in hit for hit in hits)
    print(f"undisturbed: {given.steps} steps on {given.processes} processes in {found.calm_s:.0f} s")
    print(f"killed:      {len(hits)} kills, {writing} of them while a checkpoint was written, {found.killed_s:.0f} s")
    print(f"             ranks hit: {', '.join(hit.split()[1] for hit in hits)}")
    print(f"disorder:    {found.disorder or 'none: no checkpoint was found half-written'}")
    same = "equal bit by bit" if found.same_records else "DIFFER"
    print(f"losses, norms, routing, evaluations of {found.records} records: {same}")
    same = "equal bit by bit" if found.same_weights else "DIFFERS"
    print(f"last checkpoint: {same}; final loss {found.final_loss:.6f}")
    if found.good and len(hits) == given.kills:
        shutil.rmtree(root)
    else:
        sys.exit(f"see {root}")


if __name__ == "__main__":
    main()
