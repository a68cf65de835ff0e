"""The package's front door: light, complete, and honest about what it has."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import zoo

ROOT = Path(__file__).parents[1]
PACKAGES = ("zoo", "zoo.blocks")

IMPORT = """
import json, sys
before = set(sys.modules)
import zoo
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_import_is_light() -> None:
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", IMPORT], cwd=ROOT, text=True))
    assert not {"torch", "hydra", "omegaconf", "pydantic", "numpy", "yaml"} & set(loaded)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_resolves_and_is_listed(package: str) -> None:
    module = sys.modules.get(package) or __import__(package, fromlist=["_"])
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    assert not hasattr(module, "something_else")


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_what_runs(package: str) -> None:
    module = __import__(package, fromlist=["_"])
    tree = ast.parse(Path(module.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert seen == module._HOMES


def test_version_is_the_distribution_s() -> None:
    assert zoo.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_build_takes_a_name_with_overrides_or_a_description() -> None:
    named = zoo.build("tiny_moe", "model.moe.num_experts=4", "model.layers=sparse", device="meta", dtype=torch.bfloat16)
    described = zoo.build(zoo.load("tiny_moe", "model.moe.num_experts=4", "model.layers=sparse"), device="meta")
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in (named, described)]
    assert shapes[0] == shapes[1]
    assert {value.dtype for value in named.parameters()} == {torch.bfloat16}
    with pytest.raises(TypeError, match="overrides change a named model"):
        zoo.build(zoo.load("tiny_moe"), "model.d_model=8")


def test_model_maps_tokens_to_logits_and_generates() -> None:
    model = zoo.build("tiny_moe", "model.layers=2*sparse")
    tokens = torch.randint(256, (2, 5))
    assert model(tokens).shape == (2, 5, 256)
    assert model.generate(tokens, max_new_tokens=3, temperature=0.0).shape == (2, 8)
