"""The command `zoo`. Each verb is the module of its name in this package, with a function `run`."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence

from zoo import ConfigError, __version__

VERBS = {
    "list": "the models and machines that zoo knows",
    "show": "one model: its layers and blocks, parameters and FLOPs",
    "diff": "what differs between two models",
    "plan": "the best layout of a model on a machine, and why",
    "dryrun": "rehearse a training step as one process of many: memory, FLOPs, what travels",
    "train": "train a model; the same as python train.py",
    "report": "compare many runs: a table, pictures, the scaling law",
    "eval": "how well a model predicts texts, and lm-eval's tasks",
    "generate": "continue a prompt with a trained model",
    "convert": "write a checkpoint in another layout, proven equal",
    "launch": "write a script that runs a planned training on a cluster",
    "export": "write a model and its layout as another engine's configuration",
}
QUICK = ("list", "show", "diff", "plan", "launch", "export", "report")
"""Verbs that end before garbage could matter: collecting it would take a tenth of their time."""
MISTAKE, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0 done, 2 a mistake in what was typed."""
    verb, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if arguments is None and verb in QUICK:
        gc.disable()
    try:
        if verb in ("-h", "--help", "help"):
            print(usage())
        elif verb == "--version":
            print(f"zoo {__version__}")
        elif verb in ("-sc", "--shell-completion"):
            importlib.import_module("zoo.cli.completion").run([verb, *rest])
        elif verb not in VERBS:
            raise ConfigError(_unknown(verb))
        else:
            importlib.import_module(f"zoo.cli.{verb}").run(rest)
        sys.stdout.flush()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads has read enough, as `| head` does; nothing more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def usage() -> str:
    """What `zoo --help` says."""
    verbs = "\n".join(f"  {verb:<10}{what}" for verb, what in VERBS.items())
    return f"""usage: zoo VERB [arguments] [overrides]

{verbs}

'zoo VERB --help' says more about one. Overrides change any setting, as in Hydra:
  zoo show tiny_moe model.moe.num_experts=64 model/moe/router=sigmoid

Completion in bash: eval "$(zoo -sc install=bash)\""""


def _unknown(verb: str) -> str:
    from zoo.spec.base import near

    hint = near(verb, VERBS)
    return f"zoo: found {verb!r}; the verbs are {', '.join(VERBS)}{f'; {hint}' if hint else ''}"
