"""What a person waits for before anything happens: imports, commands and mistakes, against bars of our own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.harness import Row, interleaved

ROOT = Path(__file__).parents[1]
ULTRA = "nemotron_3_ultra_550b_a55b"
COMMANDS = {
    "list": (1.0, ["list"]),
    f"show {ULTRA}": (1.0, ["show", ULTRA]),
    "diff": (1.0, ["diff", "qwen3_30b_a3b", "mixtral_8x7b"]),
    "plan on 4,096 GPUs": (2.0, ["plan", ULTRA, "gb300_nvl72", "hardware.num_devices=4096"]),
    "a misspelt key": (2.0, ["train", "model.moe.num_expert=4"]),
    "an impossible number": (2.0, ["train", "model.attention.num_heads=7", "model.attention.num_kv_heads=4"]),
    "an unknown model": (2.0, ["train", "model=tiny_mo"]),
}


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True)


def rows() -> list[Row]:
    """Wall-clock seconds of new processes; the ratio is the bar over ours."""
    calls = {name: lambda words=words: _python("-m", "zoo.cli", *words) for name, (_, words) in COMMANDS.items()}
    calls |= {"bare": lambda: _python("-c", "pass"), "import": lambda: _python("-c", "import zoo")}
    seconds = interleaved(calls, rounds=7, warmup=1)
    import_s = max(1e-3, seconds["import"] - seconds["bare"])
    found = [Row("import zoo", f"{1000 * import_s:.0f} ms beyond Python's own start", "bar 50 ms", 0.05 / import_s)]
    for name, (bar_s, _) in COMMANDS.items():
        found.append(Row(name, f"{seconds[name]:.2f} s", f"bar {bar_s:g} s", bar_s / seconds[name]))
    return found
