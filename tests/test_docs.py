"""What docs/ says is what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_models_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "build.py"))["models_page"]()
    assert page == (DOCS / "models.md").read_text(encoding="utf-8"), "run: python docs/build.py"
