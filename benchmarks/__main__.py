"""python -m benchmarks [NAME[:PART] ...]: measure the claims, each script in a process of its own, for RESULTS.md.

A script is a module of this folder with `rows() -> list[Row]`; its first docstring line says what it claims. One that
takes long has `PARTS`, names that `rows` takes: NAME:PART measures one of them. What is named is measured anew and
takes the place of the rows of the same titles; the rest of RESULTS.md stays. `summary(rows)` of a module gives rows
that follow from its others.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
HELPERS = {"__init__", "__main__", "harness", "meter", "fit_planner", "planner_read", "planner_rows", "planner_table"}
PACKAGES = ("torch", "transformers", "numpy", "moe-zoo")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--rows"]:
        name, _, part = arguments[1].partition(":")
        found = importlib.import_module(f"benchmarks.{name}").rows(*([part] if part else []))
        print(json.dumps([row.to_dict() for row in found]))
        return 0
    known = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)
    unknown = [name for name in arguments if name.partition(":")[0] not in known]
    if unknown:
        print(f"benchmarks: found {', '.join(unknown)}; allowed: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = False
    for named in arguments or known:
        print(f"measuring {named} ...", flush=True)
        rows, (name, _, part) = _measure(named), named.partition(":")
        failed |= rows is None
        _show(name, rows)
        _keep(name, rows, whole=not part)
    print(f"wrote {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")
    return int(failed)


def _keep(name: str, rows: list[dict[str, Any]] | None, whole: bool) -> None:
    """Put the rows of a script in the place of those of the same titles, or of all of them, in RESULTS.md."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    if rows is not None and not whole:
        titles = {row["what"] for row in rows}
        rows = [row for row in _read(parts.get(name, "")) if row["what"] not in titles] + rows
        summary = getattr(importlib.import_module(f"benchmarks.{name}"), "summary", lambda rows: rows)
        rows = [row.to_dict() for row in summary([Row(**row) for row in rows])]
    if rows is None and not whole:
        return
    parts[name] = _section(name, rows).removeprefix(f"## {name}\n") + "\n"
    sections = [f"## {key}\n{parts[key].rstrip()}\n" for key in sorted(parts)]
    RESULTS.write_text("\n".join(["# Measured claims", "", _machine(), "", *sections]), encoding="utf-8")


def _read(section: str) -> list[dict[str, Any]]:
    """The rows of a table as `_section` writes it."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    names = ("what", "ours", "other", "ratio", "note")
    return [{**dict(zip(names, row, strict=True)), "ratio": float(row[3])} for row in cells[2:]]


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
