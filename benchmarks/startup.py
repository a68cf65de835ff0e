"""What a person waits for before anything happens: imports, commands, mistakes, and giants without their numbers.

Commands against bars of our own; models of hundreds of billions of parameters on the meta device against transformers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import zoo
from benchmarks.harness import Row, interleaved

ROOT = Path(__file__).parents[1]
ULTRA = "nemotron_3_ultra_550b_a55b"
COMMANDS = {
    "list": (1.0, ["list"]),
    f"show {ULTRA}": (1.0, ["show", ULTRA]),
    "diff": (1.0, ["diff", "qwen3_30b_a3b", "mixtral_8x7b"]),
    f"plan {ULTRA}": (1.0, ["plan", ULTRA, "gb300_nvl72"]),
    "plan on 4,096 GPUs": (2.0, ["plan", ULTRA, "gb300_nvl72", "hardware.num_devices=4096"]),
    "a misspelt key": (2.0, ["train", "model.moe.num_expert=4"]),
    "an impossible number": (2.0, ["train", "model.attention.num_heads=7", "model.attention.num_kv_heads=4"]),
    "an unknown model": (2.0, ["train", "model=tiny_mo"]),
}
GIANTS = ("deepseek_v3", "qwen3_235b_a22b", ULTRA)


def rows() -> list[Row]:
    return [*command_rows(), *(meta_row(name) for name in GIANTS)]


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True)


def command_rows(names: tuple[str, ...] = tuple(COMMANDS), rounds: int = 7) -> list[Row]:
    """Wall-clock seconds of new processes; the ratio is the bar over ours."""
    calls: dict[str, Callable[[], None]] = {
        name: lambda words=COMMANDS[name][1]: _python("-m", "zoo.cli", *words)  # type: ignore[misc]
        for name in names
    }
    calls |= {"bare": lambda: _python("-c", "pass"), "import": lambda: _python("-c", "import zoo")}
    seconds = interleaved(calls, rounds, warmup=1)
    import_s = max(1e-3, seconds["import"] - seconds["bare"])
    found = [Row("import zoo", f"{1000 * import_s:.0f} ms beyond Python's own start", "bar 50 ms", 0.05 / import_s)]
    for name in names:
        bar_s = COMMANDS[name][0]
        found.append(Row(name, f"{seconds[name]:.2f} s", f"bar {bar_s:g} s", bar_s / seconds[name]))
    return found


def meta_row(name: str, rounds: int = 5) -> Row:
    """Building the model without numbers, configuration to module, in this process; imports are done before."""
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = zoo.load(name)
    found = zoo.spec_to_hf(spec)
    config = AutoConfig.for_model(**found)

    def theirs() -> torch.nn.Module:
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
        return model

    ours, other = zoo.build(spec, device="meta"), theirs()
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (ours, other)]
    seconds = interleaved({"zoo": lambda: zoo.build(spec, device="meta"), "transformers": theirs}, rounds, warmup=1)
    mine, peer = seconds["zoo"], seconds["transformers"]
    note = f"{sizes[0] / 1e9:.1f}B parameters, transformers {sizes[1] / 1e9:.1f}B"
    return Row(
        f"{name} on the meta device", f"{1000 * mine:.0f} ms", f"transformers {1000 * peer:.0f} ms", peer / mine, note
    )
