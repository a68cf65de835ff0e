"""Reading what was written: commands of scripts, and calls of Python files with their keywords."""

from __future__ import annotations

import ast
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MEGATRON = json.loads((HERE / "megatron_bridge.json").read_text())
TITAN = json.loads((HERE / "torchtitan.json").read_text())
SKYPILOT = json.loads((HERE / "skypilot.json").read_text())


def recorded_calls(text: str, keys: dict[str, list[str]]) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a name that the other package has, and none of a name that it lacks."""
    tree = ast.parse(text)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)} | {"layer", "partial", "pretrain"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name not in own:
                assert name in keys, f"{name} is not recorded"
                yield name, node


def assert_keys_exist(text: str, keys: dict[str, list[str]]) -> None:
    for name, node in recorded_calls(text, keys):
        unknown = {keyword.arg for keyword in node.keywords} - set(keys[name])
        assert not unknown, f"{name} has no {unknown}"


def values_of(text: str, call: str) -> dict[str, Any]:
    """The keywords of the only call of a name; what is no literal stays source."""
    (node,) = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and ast.unparse(n.func) == call]
    return {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}


def _value(node: ast.expr) -> Any:
    source = ast.unparse(node)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return eval(source, {"__builtins__": {}}) if set(source) <= set("[]0123456789 *+, ()") else source


def assert_origins(text: str) -> None:
    """Every argument on a line of its own says who decided it; calls inside of calls may leave it to theirs."""
    for line in text.splitlines():
        if line.startswith("    ") and "=" in line and line.endswith(","):
            raise AssertionError(f"no origin: {line}")


def bash(*arguments: str, path: str = "", **environment: str) -> str:
    """What a script prints."""
    environment = {"PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"], **environment}
    ran = subprocess.run(["bash", *arguments], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
