"""What all parallel tests share: a pool of processes, and what a single process gave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from tests.parallel import cases
from tests.parallel.pool import Pool


class Reference(Protocol):
    """The file with what a single process gave."""

    def __call__(self, name: str, dtype: torch.dtype, micro_batches: int = cases.MICRO_BATCHES) -> Path: ...


def check(answers: list[dict[str, Any]], bar: float) -> None:
    """Of what `cases.compare` gave on every process."""
    for worst in answers:
        assert worst["losses"] <= bar
        assert worst["norm"] <= bar
        assert worst["grads"] <= bar, worst["where"]
        assert worst["counts"]


@pytest.fixture(scope="session")
def shared_pool() -> Iterator[list[Pool]]:
    pools: list[Pool] = [Pool()]
    yield pools
    pools[0].close()


@pytest.fixture
def pool(shared_pool: list[Pool]) -> Iterator[Pool]:
    """Processes for one test. A test that fails may leave them in disorder: the next one gets others."""
    yield shared_pool[0]
    if shared_pool[0].broken:
        shared_pool[0].close()
        shared_pool[0] = Pool()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, shared_pool: list[Pool]) -> Reference:
    folder, made = tmp_path_factory.mktemp("references"), dict[Any, Path]()

    def path_of(name: str, dtype: torch.dtype, micro_batches: int = cases.MICRO_BATCHES) -> Path:
        key = name, dtype, micro_batches
        if key not in made:
            made[key] = folder / f"{len(made)}.pt"
            shared_pool[0].run(1, cases.reference, name, dtype, made[key], micro_batches)
        return made[key]

    return path_of
