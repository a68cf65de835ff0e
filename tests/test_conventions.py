"""Rules of the tree that reviews would otherwise have to watch."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
MODELS = sorted((ROOT / "conf/model").glob("*.yaml"))
ENGLISH = {"step"}
"""Families whose names are everyday words."""


def families() -> set[str]:
    """The leading words of the family names on the cards: `qwen` of `qwen3_moe`."""
    cards = [yaml.safe_load(path.read_text()).get("card") for path in MODELS]
    words = {re.match(r"[a-z]+", card["family"]) for card in cards if card}
    return {word[0] for word in words if word} - ENGLISH


def test_a_family_is_data() -> None:
    names = families()
    assert {"llama", "qwen", "olmoe"} <= names
    pattern = re.compile(rf"(?<![a-z])({'|'.join(sorted(names))})(?![a-z])", re.IGNORECASE)
    code = [path for path in (ROOT / "zoo").rglob("*.py") if not path.is_relative_to(ROOT / "zoo/hf")]
    assert len(code) > 50
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*code, ROOT / "train.py"]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_a_model_is_short() -> None:
    assert [path.name for path in MODELS if len(path.read_text().splitlines()) > 30] == []


def test_blocks_stay_readable() -> None:
    long = [path.name for path in (ROOT / "zoo/blocks").glob("*.py") if len(path.read_text().splitlines()) > 400]
    assert long == []
