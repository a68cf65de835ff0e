"""How the processes of a run find each other, and what torchrun's agent keeps for those that come after them."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from zoo.train.distributed import Together
from zoo.train.errors import TrainingError
from zoo.train.torchrun import Launch

_GLANCE_S = 0.02


def meet(launch: Launch) -> Together:
    """Find the other processes. Every one of them has to come."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    agent = _agent(launch)
    if agent is None:
        dist.init_process_group(backend)
    else:
        # torchrun's agent keeps one store for all attempts (torch 2.13), with addresses of processes that are gone.
        store = PrefixStore(f"zoo/{launch.run_id}/{agreed(launch, agent)}", agent)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size)
    return Together(launch)


def agreed(launch: Launch, agent: TCPStore) -> str:
    """A word that the processes of this attempt alone know: how many attempts there were, machines count differently.

    Every process says a word of its own, the first one repeats it with the common one, and hears the common one back:
    what earlier processes have said answers nobody.
    """
    own, keys = uuid4().hex, [f"zoo/{launch.run_id}/{what}_{{}}" for what in ("hello", "answer", "heard")]
    if launch.rank > 0:
        hello, answer, heard = (key.format(launch.rank) for key in keys)
        agent.set(hello, own)
        while (words := _said(agent, answer).split())[:1] != [own]:
            time.sleep(_GLANCE_S)
        agent.set(heard, words[1])
        return words[1]
    missing = {rank: tuple(key.format(rank) for key in keys) for rank in range(1, launch.size)}
    while missing:
        for rank, (hello, answer, heard) in list(missing.items()):
            agent.set(answer, f"{_said(agent, hello) or '-'} {own}")
            if _said(agent, heard) == own:
                del missing[rank]
        time.sleep(_GLANCE_S)
    return own


def _said(agent: TCPStore, key: str) -> str:
    return agent.get(key).decode() if agent.check([key]) else ""


def part(crew: Together) -> None:
    """Part from the other processes when all is done.

    Raises:
        TrainingError: the last checkpoint could not be written.
    """
    try:
        crew.close()
    except OSError as error:
        raise TrainingError(f"the last checkpoint cannot be written: {error}; those before it are sound") from error
    dist.destroy_process_group()


def recalled(launch: Launch) -> Path | None:
    """The run directory that the processes before these worked in, which torchrun's agent has kept; None: there were
    none."""
    store = _agent(launch)
    key = _key(launch)
    return Path(store.get(key).decode()) if store is not None and store.check([key]) else None


def remember(launch: Launch, run_dir: Path) -> None:
    """Let the processes after these know where they worked."""
    store = _agent(launch)
    if store is not None:
        store.set(_key(launch), str(run_dir.absolute()))


def _key(launch: Launch) -> str:
    return f"zoo/{launch.run_id}/run_dir"


def _agent(launch: Launch) -> TCPStore | None:
    if launch.store is None:
        return None
    return TCPStore(*launch.store, is_master=False, timeout=timedelta(minutes=5))
