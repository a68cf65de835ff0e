"""Settings that every test shares: one thread a worker, no network, a fixed seed."""

from __future__ import annotations

import os
import sys

import pytest

# Set before torch is first imported, and inherited by the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Seeds torch where the test's module has imported it; importing it here would slow every other test."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs: a machine of known speed, and no pictures."""
    from zoo.hardware import Speed
    from zoo.train import assembly, loop

    monkeypatch.setattr(assembly, "measure", lambda chip: Speed({"fp32": 0.1, "bf16": 0.1}, 10.0))
    monkeypatch.setattr(loop, "write_plots", lambda run_dir: [])
