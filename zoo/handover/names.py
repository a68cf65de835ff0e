"""What targets call their modules and classes: some are named after families of models, and a family is data."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def names_of(target: str) -> dict[str, Any]:
    """The names in the file of a target, `megatron_bridge` or `torchtitan`."""
    text = resources.files("zoo.handover").joinpath(f"{target}.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
