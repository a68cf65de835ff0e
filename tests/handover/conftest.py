"""The recipes of a model, and the errors of a command, for all tests of handing over."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.handover import megatron_bridge, torchtitan
from zoo.handover.hand import Hand, hand_over
from zoo.handover.training import Training

sys.path.insert(0, str(Path(__file__).parent))

LAYOUT = {"tp": 1, "pp": 1, "cp": 1, "micro_batch": 1, "recompute": "none"}
TARGETS = {"megatron_bridge": megatron_bridge, "torchtitan": torchtitan}


@pytest.fixture
def recipe() -> Callable[..., tuple[str, Hand]]:
    """Writes the recipe of a model on 256 GPUs, by default with little that is left to search."""

    def write(
        target: str, model: str, *overrides: str, train: tuple[str, ...] = (), **options: object
    ) -> tuple[str, Hand]:
        given = {**LAYOUT, "seq_len": 4096, "global_batch": 1024, **options}
        given = {name: value for name, value in given.items() if value is not None}
        module = TARGETS[target]
        hand = hand_over(module.TARGET, model, "gb300_nvl72", ["hardware.num_devices=256", *overrides], given)
        return module.recipe(hand, Training.of(train, hand.question.optimizer)), hand

    return write


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command says that ends with status 2."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        return err.strip()

    return run
