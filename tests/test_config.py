"""Composition: what overrides do, where they may come from, and that nobody else's Hydra notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import zoo
from zoo import registry
from zoo.config import compose, options_of
from zoo.spec.base import TypedSpec, decode, registered
from zoo.spec.block import BlockSpec
from zoo.spec.composed import plain
from zoo.spec.model import ModelSpec
from zoo.spec.router import RouterSpec
from zoo.spec.run import decode_run

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
MODELS = zoo.list_models()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of configurations, registered again by whoever fills it."""
    monkeypatch.setattr(registry, "_FOLDERS", {})
    (tmp_path / "model").mkdir()
    return tmp_path


def test_listing_takes_shell_patterns() -> None:
    assert {"tiny_dense", "tiny_moe"} == set(zoo.list_models("tiny_*"))
    assert zoo.list_models("*moe*") == [name for name in MODELS if "moe" in name]
    assert sorted(MODELS) == MODELS
    assert {"auto", "cpu", "rtx4090", "h100_8x", "gb300_nvl72"} <= set(zoo.list_hardware())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_survives_yaml_under_its_own_name(name: str) -> None:
    spec = zoo.load(name)
    assert spec.name == name
    text = yaml.safe_dump(spec.to_dict())
    assert decode(ModelSpec, yaml.safe_load(text)) == spec


@pytest.mark.parametrize("name", MODELS)
def test_a_model_s_file_is_short(name: str) -> None:
    assert len((ROOT / f"conf/model/{name}.yaml").read_text().splitlines()) <= 30


def test_overrides_reach_every_depth() -> None:
    spec = zoo.load(
        "tiny_moe",
        "model/moe/router=sigmoid",
        "model.moe.num_experts=32",
        "model.moe.router.route_scale=2.5",
        "model/attention=sliding",
        "model.attention.window=64",
        "model.attention.rope.scaling={type: linear, factor: 2.0}",
        "+model.norm.eps=1e-5",
        "~model.moe.balance",
    )
    moe, attention = spec.slots["moe"], spec.slots["attention"]
    assert (moe.num_experts, moe.router.score, moe.router.route_scale) == (32, "sigmoid", 2.5)
    assert (attention.mask, attention.window, attention.rope.scaling.factor) == ("sliding", 64, 2.0)
    assert attention.num_heads == 6  # what the model's own file says stays
    assert spec.norm.eps == 1e-5
    assert moe.balance.aux_loss == 0


def test_a_slot_under_another_name() -> None:
    spec = zoo.load(
        "tiny_dense",
        "+model/attention@model.local=sliding",
        "model.local.num_heads=4",
        "model.local.num_kv_heads=1",
        "model.local.window=8",
        "+model.kinds.near={mixer: local, ffn: mlp}",
        "model.layers='2*(near dense)'",
    )
    assert spec.layer_kinds == ("near", "dense", "near", "dense")
    assert spec.slots["local"].window == 8


def test_switching_a_group_replaces_the_old_option_and_keeps_what_the_model_says(folder: Path) -> None:
    said = {
        "defaults": [{"attention": "gqa"}, {"moe": "routed"}, {"moe/router": "softmax_raw"}, "_self_"],
        "moe": {"router": {"route_scale": 2.0}},
    }
    tiny = yaml.safe_load((ROOT / "conf/model/tiny_moe.yaml").read_text())
    moe = {**tiny["moe"], **said["moe"]}
    (folder / "model/scaled.yaml").write_text(yaml.safe_dump({**tiny, **said, "moe": moe}))
    zoo.register(configs=folder)
    before, after = (zoo.load("scaled", *change).slots["moe"].router for change in ([], ["model/moe/router=sigmoid"]))
    assert (before.score, before.normalize, before.route_scale) == ("softmax", False, 2.0)
    assert (after.score, after.normalize, after.route_scale) == ("sigmoid", True, 2.0)


def test_model_alone_and_whole_run_compose_to_the_same_model() -> None:
    changes = ["model/moe/router=sigmoid", "model.moe.num_experts=16"]
    alone = zoo.load("tiny_moe", *changes)
    beside = zoo.load("tiny_moe", *changes, "train.steps=7")
    run = decode_run(compose(["model=tiny_moe", *changes]))
    assert alone == beside == run.model


def test_overrides_may_refer_to_the_rest_of_the_configuration() -> None:
    assert zoo.load("tiny_moe", "model.d_model=${train.seq_len}").d_model == compose([]).train.seq_len


def test_a_name_in_the_file_wins(folder: Path) -> None:
    (folder / "model/mine.yaml").write_text("defaults: [tiny_moe, _self_]\nname: better\n")
    zoo.register(configs=folder)
    assert "mine" in zoo.list_models()
    assert zoo.load("mine").name == "better"
    assert compose(["model=mine"]).model.name == "better"


def test_compose_names_the_model_and_leaves_hydra_out() -> None:
    cfg = compose(["model=tiny_dense"])
    assert cfg.model.name == "tiny_dense"
    assert "hydra" not in cfg


def test_an_application_around_us_keeps_its_hydra(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("x: 3\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2", job_name="theirs"):
        theirs, instance = GlobalHydra.instance(), GlobalHydra.instance().hydra
        assert zoo.load("tiny_moe").d_model == 192
        with pytest.raises(zoo.ConfigError):
            zoo.load("tiny_moe", "model.x=3")
        assert GlobalHydra.instance() is theirs
        assert theirs.hydra is instance
        assert str(version.getbase()) == "1.2"
        assert hydra_compose("config", ["x=5"]).x == 5
    assert not GlobalHydra.instance().is_initialized()


# What the files of the groups say, against the specs.

FULL = {  # files that show every option of their block, and what has no default there
    "model/attention/gqa": {"num_heads": 4, "num_kv_heads": 2},
    "model/mlp/swiglu": {"d_ffn": 8},
    "model/moe/routed": {"num_experts": 4, "top_k": 2, "d_expert": 8},
    "model/moe/router/softmax": {},
    "model/moe/router/sparse_mixer": {},
    "model/delta/gated": {"num_heads": 4, "head_dim": 8},
    "model/conv/short": {},
}


@pytest.mark.parametrize("path", FULL)
def test_group_files_show_every_option_at_its_default(path: str) -> None:
    group, _, option = path.rpartition("/")
    shown = yaml.safe_load((ROOT / f"conf/{path}.yaml").read_text())
    base = RouterSpec if group.endswith("router") else BlockSpec
    spec = decode(registered(base)[shown["type"]], {**shown, **FULL[path]})
    by_default = decode(type(spec), FULL[path])
    assert spec == by_default, f"{option} does not show the defaults"
    options = {path for path in _paths(spec.to_dict()) if path.split(".")[0] != "router"}  # a group of its own
    assert options == _paths(shown)


def _paths(data: dict[str, Any], path: str = "") -> set[str]:
    nested = [_paths(value, f"{path}{key}.") for key, value in data.items() if isinstance(value, dict)]
    return {f"{path}{key}" for key in data}.union(*nested)


@pytest.mark.parametrize("router", options_of("model/moe/router"))
def test_every_router_fits_a_model(router: str) -> None:
    assert isinstance(zoo.load("tiny_moe", f"model/moe/router={router}").slots["moe"].router, TypedSpec)


@pytest.mark.parametrize("mlp", options_of("model/mlp"))
def test_every_mlp_fits_a_model(mlp: str) -> None:
    assert zoo.load("tiny_dense", f"model/mlp={mlp}").slots["mlp"].d_ffn == 512


# The resolved configurations that we answer for: a changed default shows up in review.


@pytest.mark.parametrize("name", ["default_run", "tiny_dense"])
def test_resolved_configurations_are_as_reviewed(name: str) -> None:
    resolved = decode_run(compose([])).to_dict() if name == "default_run" else zoo.load(name).to_dict()
    path = GOLDEN / f"{name}.yaml"
    text = yaml.safe_dump(resolved, sort_keys=False)
    if os.environ.get("ZOO_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), "if the change is meant: ZOO_WRITE_GOLDEN=1 python -m pytest tests/test_config.py"


def test_plain_names_all_that_is_missing() -> None:
    with pytest.raises(zoo.ConfigError, match=r"a: missing.*\nb\.c: missing"):
        plain(OmegaConf.create({"b": {"c": "???"}, "a": "???"}))


# From outside: an installed package brings a block and a model of it, and imports torch only to build it.

SPEC = """
from pathlib import Path
from typing import Literal
import zoo
from zoo.spec.block import FFNSpec

class DoublingSpec(FFNSpec):
    type: Literal["doubling"] = "doubling"
    factor: float = 2.0

def bring():
    zoo.register(
        DoublingSpec,
        module="outside.work:Doubling",
        cost="outside.work:DoublingCost",
        configs=Path(__file__).parent / "conf",
    )
"""
WORK = """
import torch
from torch import nn
from outside.spec import DoublingSpec
from zoo.blocks.base import Block
from zoo.plan.base import Cost, Weight

class Doubling(Block):
    describes = DoublingSpec
    def __init__(self, d_model, spec=None, **options):
        super().__init__(d_model, spec, **options)
        self.weight = nn.Parameter(torch.empty(d_model))
    def init_weights(self, std, out_std):
        nn.init.constant_(self.weight, self.spec.factor)
    def forward(self, x, context=None):
        return x * self.weight

class DoublingCost(Cost):
    prices = DoublingSpec
    def weights(self):
        return [Weight("weight", (self.d_model,))]
"""
DOUBLED = """
defaults: [attention: gqa, doubling: plain, _self_]
d_model: 16
vocab_size: 8
attention: {num_heads: 2, num_kv_heads: 1}
kinds: {double: {mixer: attention, ffn: doubling}}
layers: 2*double
"""
USE = """
import json, sys, zoo
spec = zoo.load("doubled", "model.doubling.factor=3")
light = "torch" not in sys.modules
import torch
model = zoo.build(spec)
weights = model.state_dict()["layers.0.ffn.weight"]
counts = [spec.params().total, sum(weight.numel() for weight in model.parameters())]
logits = model(torch.zeros(1, 2, dtype=torch.long))
print(json.dumps([light, "doubled" in zoo.list_models(), weights.unique().tolist(), counts, list(logits.shape)]))
"""


def test_installed_package_brings_a_block_and_a_model(tmp_path: Path) -> None:
    files = {
        "outside/__init__.py": "",
        "outside/spec.py": SPEC,
        "outside/work.py": WORK,
        "outside/conf/model/doubling/plain.yaml": "type: doubling\nfactor: 2.0\n",
        "outside/conf/model/doubled.yaml": DOUBLED,
        "outside-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n",
        "outside-1.0.dist-info/entry_points.txt": "[zoo.blocks]\noutside = outside.spec:bring\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    light, found, weights, counts, shape = json.loads(subprocess.check_output([sys.executable, "-c", USE], env=env))
    assert light
    assert found
    assert weights == [3.0]
    assert counts[0] == counts[1]
    assert shape == [1, 2, 8]


def test_broken_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken-1.0.dist-info").mkdir()
    (tmp_path / "broken-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (tmp_path / "broken-1.0.dist-info/entry_points.txt").write_text("[zoo.blocks]\nb = no_such_module:bring\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-m", "zoo.cli", "list"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "entry point b = no_such_module:bring of broken: ModuleNotFoundError: No module named 'no_such_module'; "
        "mend or uninstall that package\n"
    )
    assert done.stdout == ""


def test_register_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(zoo.ConfigError, match="there is no such folder"):
        zoo.register(configs=tmp_path / "nowhere")
    with pytest.raises(zoo.ConfigError, match="it holds no files such as"):
        zoo.register(configs=tmp_path)
    with pytest.raises(TypeError, match="give the spec"):
        zoo.register(module="a:B")
