"""Completion for the shell: `eval "$(zoo -sc install=bash)"`. Overrides are completed by Hydra."""

from __future__ import annotations

import os
from collections.abc import Sequence

from zoo.cli import VERBS
from zoo.config import list_models
from zoo.spec.base import ConfigError


def run(arguments: Sequence[str]) -> None:
    """Answer `-sc query=bash`, which the shell asks with its line in COMP_LINE; other requests go to Hydra."""
    if not arguments[1:]:
        raise ConfigError("zoo -sc: has no value; write -sc install=bash")
    line = os.environ.get("COMP_LINE", "")
    verb, *words = line.split()[1:] or [""]
    if not arguments[-1].startswith("query=") or verb == "train":
        from zoo.train.run import main

        os.environ["COMP_LINE"] = line.replace(" train", "", 1)
        main(arguments, program="zoo")
    elif not words and not (verb and line.endswith(" ")):
        print(*(known for known in VERBS if known.startswith(verb)))
    elif verb in ("show", "diff", "plan", "dryrun"):
        start = "" if line.endswith(" ") else words[-1]
        print(*list_models(f"{start}*"))
