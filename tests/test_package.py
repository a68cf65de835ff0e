"""The distribution: what the wheel holds, and that it works away from this tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import zoo

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command in `cwd`, out of this tree's reach, and give what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(home: Path, *what: str | Path) -> Path:
    """Make a virtual environment that holds zoo alone, installed from `what`, and give its Python.

    The packages that zoo needs are lent by the environment of the tests. A path file lends a folder without reading
    the path files in it, so that a zoo installed there in editable form stays out.
    """
    venv.create(home, symlinks=True)
    lent = Path(sysconfig.get_path("purelib", vars={"base": str(home)})) / "lent.pth"
    lent.write_text(sysconfig.get_path("purelib"))
    # --ignore-installed: pip would remove the zoo of the environment it runs in.
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "install", *options, "--ignore-installed", "--prefix", home, *what, cwd=home)
    return home / "bin/python"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree: a build writes into the tree that it builds."""
    unwanted = shutil.ignore_patterns(
        ".*", "__pycache__", "build", "dist", "*.egg-info", "multirun", "outputs", "wandb"
    )
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=unwanted))


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with zoo installed from its wheel."""
    return environment(tmp_path_factory.mktemp("installed"), wheel)


def test_wheel_holds_the_package_and_every_config(wheel: Path, source: Path) -> None:
    code = {path.relative_to(source).as_posix() for path in (source / "zoo").rglob("*") if path.is_file()}
    configs = {"zoo" / path.relative_to(source) for path in (source / "conf").rglob("*.yaml")}
    expected = code | {path.as_posix() for path in configs} | {"zoo/conf/__init__.py"}
    assert "zoo/conf/config.yaml" in expected
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected


LIST_AND_BUILD = """
import json, zoo, zoo.conf
on_meta = {n: {p.device.type for p in zoo.build(n, device="meta").parameters()} == {"meta"} for n in zoo.list_models()}
print(json.dumps({"files": [zoo.__file__, zoo.conf.__file__], "on_meta": on_meta}))
"""


def test_installed_wheel_builds_every_model(installed: Path, tmp_path: Path) -> None:
    found = json.loads(run(installed, "-c", LIST_AND_BUILD, cwd=tmp_path))
    assert all(Path(file).is_relative_to(installed.parents[1]) for file in found["files"])
    assert found["on_meta"] == dict.fromkeys(zoo.list_models(), True)


def test_installed_command_lists_every_model(installed: Path, tmp_path: Path) -> None:
    assert set(zoo.list_models()) <= set(run(installed, installed.with_name("zoo"), "list", cwd=tmp_path).split())


COMPOSE = """
import zoo.conf
from hydra import compose, initialize_config_module
with initialize_config_module("zoo.conf", version_base="1.3"):
    print(zoo.conf.__file__, compose("model/qwen3_30b_a3b").model.d_model)
"""


def test_editable_install_resolves_the_configs(source: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", "--editable", source)
    assert run(python, "-c", COMPOSE, cwd=tmp_path).split() == [str(source / "conf/__init__.py"), "2048"]


OTHER_CONFIG = """
hydra: {searchpath: [pkg://zoo.conf]}
defaults: [model: qwen3_30b_a3b, _self_]
"""
OTHER_APP = """
import hydra

@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg):
    print(cfg.model.d_model, cfg.model.moe.num_experts)

main()
"""


def test_another_hydra_application_composes_a_model(installed: Path, tmp_path: Path) -> None:
    conf = tmp_path / "otherapp/conf"
    conf.mkdir(parents=True)
    (conf / "config.yaml").write_text(OTHER_CONFIG)
    (conf.parent / "__init__.py").touch()
    (conf.parent / "run.py").write_text(OTHER_APP)
    printed = run(installed, "-m", "otherapp.run", "model.moe.num_experts=64", cwd=tmp_path)
    assert printed.split() == ["2048", "64"]


def test_import_is_light() -> None:
    loaded = run(sys.executable, "-c", "import sys, zoo; print(*sys.modules)", cwd=ROOT).split()
    assert "zoo" in loaded
    assert not {"torch", "hydra"} & set(loaded)


def test_constraints_pin_every_dependency_within_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pins = dict(line.lower().split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(text) for text in sum((extras[name] for name in ("dev", "test", "data")), project["dependencies"])
    ]
    outside = [str(r) for r in wanted if r.name != project["name"] and pins.get(r.name, "0") not in r.specifier]
    assert outside == []
