"""Processes that stand ready for parallel tests: forked once, torch already imported, then given case after case."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

SECONDS = 600
"""After which a case counts as hung."""


class Pool:
    """`size` processes. `run` gives them a function, which finds the process group of its case ready."""

    def __init__(self, size: int = 8) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.parallel.preload"])
        self._folder = tempfile.TemporaryDirectory(prefix="zoo_parallel_")
        self._cases = 0
        self.broken = False
        """A case failed, and its processes may still wait for each other."""
        self._workers: list[tuple[Any, Connection]] = []
        for _ in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, mine))

    def run(self, processes: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`function(*args, **kwargs)` on ranks 0 to `processes` - 1 of a gloo group; what each returns.

        Args:
            function: of a module that the processes can import.
        """
        self._cases += 1
        store = str(Path(self._folder.name) / f"store_{self._cases}")
        for rank, (_, connection) in enumerate(self._workers[:processes]):
            connection.send((store, rank, processes, function, args, kwargs))
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(answers) + len(failures) < processes:
            missing = {self._workers[rank][1]: rank for rank in range(processes) if rank not in answers | failures}
            ready = wait(list(missing), timeout=2 if failures else SECONDS)
            if not ready:
                break
            for connection in ready:
                try:
                    done, answer = connection.recv()
                except EOFError:
                    done, answer = False, "its process has died"
                (answers if done else failures)[missing[connection]] = answer
        if len(answers) < processes:
            self.broken = True
            # One that lost its connection to another tells less than the other.
            told = sorted(failures.items(), key=lambda item: "Connection" in item[1])
            raise RuntimeError("rank {}:\n{}".format(*told[0]) if told else f"only {sorted(answers)} have answered")
        return [answers[rank] for rank in range(processes)]

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.terminate()
        self._folder.cleanup()


def _serve(connection: Connection) -> None:
    """Each case has a process of its own: what a process group leaves behind, threads above all, ends with it."""
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            _work(connection, *task)
        _, status = os.waitpid(child, 0)
        if status:
            connection.send((False, "its process has died"))
            return


def _work(
    connection: Connection, store: str, rank: int, processes: int, function: Callable[..., Any], args: Any, kwargs: Any
) -> NoReturn:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Whole gradients are put together by several collectives: slow, and only done here.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, processes), rank=rank, world_size=processes)
        answer = True, function(*args, **kwargs)
        dist.destroy_process_group()
    except Exception:
        answer = False, traceback.format_exc()
    connection.send(answer)
    os._exit(0)
