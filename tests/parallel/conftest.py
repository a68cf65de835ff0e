"""The pool of processes that all parallel tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.pool import Pool


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
