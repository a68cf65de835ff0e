"""100 runs are killed with SIGKILL, some while saving, some on a full disk: all resume, bit-identical, nothing is lost.

The losses of all steps and the last weights are those of the undisturbed run, and of the last two checkpoints that
were written to the end none is gone or damaged.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import einops.packing  # noqa: F401  these four are imported late: once, before the processes are forked
import torch._dynamo  # noqa: F401

import zoo.blocks.attention
import zoo.blocks.moe  # noqa: F401
from benchmarks.harness import Row
from zoo.config import compose
from zoo.hardware import Speed
from zoo.spec.run import RunSpec, decode_run
from zoo.train import assembly, checkpoint, crew, loop
from zoo.train.errors import TrainingError
from zoo.train.metrics_file import METRICS, MetricsFile, read_metrics
from zoo.train.rundir import find_checkpoints, sound_checkpoint

STEPS, EVERY = 30, 3
ANYWHERE, SAVING, FULL = "at any moment", "while saving", "on a full disk"
KILLS = {ANYWHERE: 40, SAVING: 35, FULL: 25}
DISK_MIB = 4
SETTINGS = [
    "model=tiny_moe",
    "model.d_model=32",
    "model.layers='1*sparse'",
    "model.moe.d_expert=32",
    "data=files",
    "hardware=cpu",
    "precision=fp32",
    "optimizer=adamw",
    f"train.steps={STEPS}",
    "train.batch_size=2",
    "train.seq_len=16",
    "train.eval_every=null",
    "train.eval_tokens=32",
    "train.sample_tokens=0",
    f"checkpoint.every={EVERY}",
    "checkpoint.resume=auto",
]


def settings(folder: Path) -> RunSpec:
    """A run of a second, on a text in `folder`."""
    text = folder / "text.txt"
    text.write_text(" ".join(random.Random(0).choices("abstract brown class def for in return self".split(), k=2000)))
    return decode_run(compose([*SETTINGS, f"data.paths='{text}'"]))


def work(run: RunSpec, run_dir: Path, told: Connection | None) -> None:
    """The process that is killed: train, and tell when a checkpoint is begun and when it is written."""
    import torch

    torch.set_num_threads(1)
    assembly.measure = lambda chip: Speed({"fp32": 0.1, "bf16": 0.1}, 10.0)  # type: ignore[assignment]
    loop.write_plots = lambda run_dir: []  # type: ignore[assignment]
    loop.versions_here = dict  # type: ignore[assignment]

    def save(folder: Path, step: int, *arguments: Any) -> Path:
        tell(told, ("begun", step))
        path = checkpoint.save_checkpoint(folder, step, *arguments)
        tell(told, ("saved", step))
        return path

    crew.save_checkpoint = save  # type: ignore[assignment]
    metrics = MetricsFile(run_dir / METRICS)
    tell(told, ("started", 0))
    try:
        loop.train(run, run_dir, [metrics])
    except TrainingError as error:
        tell(told, ("failed", str(error)))
    else:
        tell(told, ("done", 0))
    metrics.close()


def tell(told: Connection | None, what: tuple[str, Any]) -> None:
    if told is not None:
        told.send(what)


@dataclass
class Killed:
    """What is known of a process when it has ended."""

    saved: list[int]
    """Steps of the checkpoints that it wrote to the end."""
    last: str
    """What it told last."""


class Killer:
    """Starts processes that have imported everything already, and kills them.

    Args:
        seconds: That an undisturbed run takes.
    """

    def __init__(self, run: RunSpec, seed: int) -> None:
        self.run, self.random, self.seconds, self.saving = run, random.Random(seed), 1.0, 0.02
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.kills"])

    def undisturbed(self, run_dir: Path) -> None:
        """Train to the end, and note how long that and the saving of a checkpoint take."""
        process, heard = self._start(run_dir)
        times: dict[str, list[float]] = {}
        while (what := hear(heard))[0] not in ("done", "failed"):
            times.setdefault(what[0], []).append(time.monotonic())
        if what[0] == "failed":
            raise RuntimeError(what[1])
        self.seconds = time.monotonic() - times["started"][0]
        self.saving = min(end - begin for begin, end in zip(times["begun"], times["saved"], strict=True))
        process.join()

    def kill(self, run_dir: Path, kind: str, fill: Callable[[], None]) -> Killed:
        """Start a run and kill it. On a full disk `fill` is called when a checkpoint is begun."""
        process, heard = self._start(run_dir)
        saved: list[int] = []
        begun = 0 if kind == ANYWHERE else self.random.randrange(EVERY, STEPS + 1, EVERY)
        what = hear(heard)
        while what != ("begun", begun) and what[0] not in ("done", "failed") and (begun or what[0] != "started"):
            saved += [what[1]] if what[0] == "saved" else []
            what = hear(heard)
        if kind == FULL:
            fill()
        longest = {ANYWHERE: self.seconds, SAVING: 2 * self.saving, FULL: self.seconds / 2}[kind]
        time.sleep(self.random.uniform(0, longest))
        process.kill()
        process.join()
        while heard.poll():
            try:
                what = heard.recv()
            except EOFError:
                break
            saved += [what[1]] if what[0] == "saved" else []
        return Killed(saved, what[0])

    def _start(self, run_dir: Path) -> tuple[Any, Connection]:
        mine, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=work, args=(self.run, run_dir, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, mine


def hear(heard: Connection) -> tuple[str, Any]:
    """The next words of a process."""
    try:
        what: tuple[str, Any] = heard.recv()
    except EOFError:
        return "failed", "it ended without a word"
    return what


def learned(run_dir: Path) -> tuple[list[Any], dict[str, int]]:
    """The losses of every step, and the sums of the last weights and optimizer state."""
    steps = [record for record in read_metrics(run_dir / METRICS) if record["event"] == "step"]
    losses = [(record["step"], record["losses"], record["grad_norm"], record["routing"]) for record in steps]
    state = json.loads((run_dir / f"checkpoints/step_{STEPS:06d}/state.json").read_text())
    return losses, state["crc32"]


def lost(run_dir: Path, saved: list[int]) -> str:
    """Which of the last two checkpoints that were written to the end is not there, or not sound; empty: none."""
    found, _ = find_checkpoints(run_dir)
    there = [each.step for each in found]
    missing = [step for step in saved[-2:] if step not in there and len([one for one in there if one > step]) < 2]
    if not missing and found and sound_checkpoint(run_dir)[0].step != found[-1].step:
        missing = there[-1:]
    return f"the checkpoints {missing} are lost" if missing else ""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of `DISK_MIB` MiB.

    Raises:
        OSError: this user may not mount one.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        raise OSError(errno.EPERM, "no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no byte of the disk."""
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def case(killer: Killer, run_dir: Path, kind: str, disk: Path) -> tuple[Killed, str]:
    """Kill a run and let it go on; what is wrong with the result, empty when nothing is."""
    killed = killer.kill(run_dir, kind, lambda: fill(disk))
    (disk / "filler").unlink(missing_ok=True)
    if flaw := lost(run_dir, killed.saved):
        return killed, flaw
    process, heard = killer._start(run_dir)
    while (what := hear(heard))[0] not in ("done", "failed"):
        pass
    process.join()
    return killed, f"it does not go on: {what[1]}" if what[0] == "failed" else ""


def rows(kills: dict[str, int] = KILLS, seed: int = 0) -> list[Row]:
    """One row for each kind of kill."""
    found = []
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name) / "disk") as disk:
        killer = Killer(settings(Path(name)), seed)
        killer.undisturbed(Path(name) / "whole")
        expected = learned(Path(name) / "whole")
        for kind, count in kills.items():
            flaws: list[str] = []
            marks: Counter[str] = Counter()
            for index in range(count):
                run_dir = (disk if kind == FULL else Path(name)) / f"run_{index}"
                killed, flaw = case(killer, run_dir, kind, disk)
                marks[killed.last] += 1
                if not flaw and learned(run_dir) != expected:
                    flaw = "its losses or weights differ"
                flaws += [flaw] if flaw else []
                shutil.rmtree(run_dir)
            told = ", ".join(f"{number} after {mark!r}" for mark, number in sorted(marks.items()))
            good = count - len(flaws)
            what = f"killed {kind}: {count} runs of {STEPS} steps"
            found.append(Row(what, f"{good} bit-identical", f"bar {count}", good / count, "; ".join([told, *flaws])))
    return found
