"""What a run was made of: its settings and the versions beneath them, written into the run directory."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from zoo.spec.run import RunSpec

CONFIG, VERSIONS = "config.yaml", "versions.json"
PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "pydantic", "safetensors")


def write_provenance(run: RunSpec, run_dir: Path) -> list[Path]:
    """Write the resolved settings and the versions, anew when a run goes on; the files."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config, versions = run_dir / CONFIG, run_dir / VERSIONS
    config.write_text(OmegaConf.to_yaml(OmegaConf.create(run.to_dict())), encoding="utf-8")
    facts = {**versions_here(), "command": sys.argv}
    versions.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return [config, versions]


@cache
def versions_here() -> dict[str, Any]:
    """Versions of zoo and of what it stands on, and the git revision when zoo runs from a checkout."""
    return {
        "zoo": _version("moe-zoo"),
        "git": git_revision(Path(__file__).parent),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks `folder`, and whether files differ from it; None outside of a checkout."""
    tracked = _git(folder, "ls-files", "--", ".")
    revision = _git(folder, "rev-parse", "HEAD")
    if not tracked or not revision:
        return None
    return {"revision": revision, "dirty": bool(_git(folder, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command; empty when there is no git or it fails."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
