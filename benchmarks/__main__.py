"""python -m benchmarks [NAME ...]: measure the claims, each script in a process of its own, and write RESULTS.md.

A script is a module of this folder with `rows() -> list[Row]`; its first docstring line says what it claims.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
HELPERS = {"__init__", "__main__", "harness", "meter", "fit_planner", "planner_read", "planner_rows", "planner_table"}
PACKAGES = ("torch", "transformers", "numpy", "moe-zoo")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--rows"]:
        module = importlib.import_module(f"benchmarks.{arguments[1]}")
        print(json.dumps([row.to_dict() for row in module.rows()]))
        return 0
    known = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)
    unknown = [name for name in arguments if name not in known]
    if unknown:
        print(f"benchmarks: found {', '.join(unknown)}; allowed: {', '.join(known)}", file=sys.stderr)
        return 2
    sections, failed = [], False
    for name in arguments or known:
        print(f"measuring {name} ...", flush=True)
        rows = _measure(name)
        failed |= rows is None
        sections.append(_section(name, rows))
        _show(name, rows)
    if not arguments:
        RESULTS.write_text("\n".join(["# Measured claims", "", _machine(), "", *sections]) + "\n", encoding="utf-8")
        print(f"wrote {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")
    return int(failed)


def _measure(name: str) -> list[dict[str, Any]] | None:
    """The rows of a script; None when it fails, after its own words."""
    command = [sys.executable, "-m", "benchmarks", "--rows", name]
    done = subprocess.run(command, cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None
    rows: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return rows


def _claim(name: str) -> str:
    """The first line of a script's docstring, without importing it."""
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8").split('"""')[1].splitlines()[0]


def _section(name: str, rows: list[dict[str, Any]] | None) -> str:
    lines = [f"## {name}", "", _claim(name), "", f"`make bench ARGS={name}`", ""]
    if rows is None:
        return "\n".join([*lines, "It failed.", ""])
    lines += ["| what | ours | other | ratio | |", "|---|---|---|---:|---|"]
    lines += [f"| {r['what']} | {r['ours']} | {r['other']} | {r['ratio']:.2f} | {r['note']} |" for r in rows]
    return "\n".join([*lines, ""])


def _show(name: str, rows: list[dict[str, Any]] | None) -> None:
    if rows is None:
        print(f"{name} failed", file=sys.stderr)
        return
    table = Table("what", "ours", "other", "ratio", "", title=_claim(name), title_justify="left")
    for r in rows:
        table.add_row(r["what"], r["ours"], r["other"], f"{r['ratio']:.2f}", r["note"])
    Console().print(table)


def _machine() -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    processor = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores ({processor}), Python {platform.python_version()}, {versions}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
