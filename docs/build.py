"""python docs/build.py: writes what is made from the code's own data (models.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import zoo
from zoo.spec.model import ModelSpec

MODELS = Path(__file__).parent / "models.md"
HEAD = """# Models

Made by `python docs/build.py` from `conf/model/`. `total` counts every trained parameter with both embedding tables and
without multi-token-prediction blocks; `active` is what one token touches, both tables included. `claimed` is what the
makers say, total / active; their conventions differ.

| model | family | total | active | context | layers | blocks | claimed | source |
|---|---|---:|---:|---:|---|---|---|---|
"""


def models_page() -> str:
    """The table of all models."""
    return HEAD + "".join(f"{row}\n" for row in _rows())


def _rows() -> Iterator[str]:
    for name in zoo.list_models():
        spec = zoo.load(name)
        params, card = spec.params(), spec.card
        claimed = " / ".join(filter(None, (card.claimed_total, card.claimed_active))) if card else ""
        cells = [
            f"`{name}`",
            card.family if card else "",
            f"{params.total:,}",
            f"{params.active:,}",
            f"{card.context:,}" if card else "",
            f"{spec.num_layers}: `{spec.layers}`" if len(spec.layers) <= 40 else f"{spec.num_layers}",
            _blocks(spec),
            claimed,
            card.source.replace("|", "/") if card else "made for this project",
        ]
        yield f"| {' | '.join(cells)} |"


def _blocks(spec: ModelSpec) -> str:
    return ", ".join(slot if slot == block.type else f"{slot} ({block.type})" for slot, block in spec.slots.items())


if __name__ == "__main__":
    MODELS.write_text(models_page(), encoding="utf-8")
    print(f"wrote {MODELS}")
