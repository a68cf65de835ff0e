"""transformers without its notes and bars."""

from __future__ import annotations

import pytest
import transformers


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
