"""What a process is set up with, and what is said about it; each probe in a process of its own, which it may change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.blocks import compiled
from zoo.native.library import library

REPORT = """
import torch
from zoo.tuning import tune, tuned
assert tuned() is None
before = torch.get_num_threads(), torch.get_rng_state()
found = tune()
assert tuned() is found and tune() is found
assert torch.equal(before[1], torch.get_rng_state())
x, w = torch.randn(64, 128, dtype=torch.float64), torch.randn(96, 128, dtype=torch.float64)
error = ((x.float() @ w.float().t()).double() - x @ w.t()).abs().max() / (x @ w.t()).abs().max()
assert error < 1e-6, error
print(*found, sep="\\n")
"""


def report(cache: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


def test_without_a_compiler_everything_else_is_set_up(tmp_path: Path) -> None:
    """A machine that never saw zoo and has no C++ compiler: one line says what is missing, and nothing fails."""
    lines = report(tmp_path, PATH="", CXX="")
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "threads",
        lines[2].partition(":")[0],
        "experts grouped",
        "zoo",
    ]
    assert lines[2].startswith("fp32 products by ")
    assert "no compiled kernels" in lines[3]
    assert "there is no C++ compiler" in lines[4]


def test_what_was_probed_is_kept(tmp_path: Path) -> None:
    first, second = (report(tmp_path, PATH="", CXX="") for _ in range(2))
    assert first == second
    assert len(list((tmp_path / "zoo").glob("tuning-*.json"))) == 1
    for path in (tmp_path / "zoo").glob("tuning-*.json"):
        path.write_text('{"error": 1e-7, "gain": 1.5}', encoding="utf-8")
    assert report(tmp_path, PATH="", CXX="")[2].startswith("fp32 products by oneDNN: 1.50 times as fast here")
    for path in (tmp_path / "zoo").glob("tuning-*.json"):
        path.write_text("[1", encoding="utf-8")
    assert report(tmp_path, PATH="", CXX="")[2].startswith("fp32 products by ")


def test_experts_follow_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(compiled, "_preferred", True)
    assert compiled.is_ready()
    compiled.prefer(False)
    assert not compiled.is_ready()
