"""The command line of a training run, before and after the training itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from zoo.spec.base import ConfigError
from zoo.train.run import _quoted, _wait_asleep, checked


@pytest.mark.parametrize(
    "path",
    [
        "outputs/2026-01-02/03-04-05-tiny_moe",
        "/tmp/run",
        "run",
        "1",
        "null",
        "a b/c",
        "it's/here",
        "back\\slash/x",
        "back\\'slash\\",
        "k=v/{x}",
        "[1]/2",
        "a,b/c",
        "1e5",
        "./5",
    ],
)
def test_a_directory_survives_the_grammar_of_overrides(path: str) -> None:
    override = OverridesParser.create().parse_override(f"checkpoint.resume={_quoted(Path(path))}")
    value = override.value()
    found = value if isinstance(value, str) else value.text
    assert type(found) is str
    assert Path(found) == Path(path)


def test_a_sound_command_line_passes_and_a_mistake_in_any_job_does_not() -> None:
    assert checked(["model=tiny_dense", "train.steps=3"]) == ["model=tiny_dense", "train.steps=3"]
    assert checked(["--help"]) == ["--help"]
    with pytest.raises(ConfigError, match=r"^hardware.num_devices: found 8"):
        checked(["hardware=h100_8x"])
    with pytest.raises(ConfigError, match=r"^in the job hardware=h100_8x .*:\nhardware.num_devices: found 8"):
        checked(["-m", "hardware=cpu,h100_8x", "train.steps=3"])


def test_threads_wait_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "to be removed afterwards")
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    _wait_asleep()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    _wait_asleep()
    assert os.environ["GOMP_SPINCOUNT"].isdigit()
