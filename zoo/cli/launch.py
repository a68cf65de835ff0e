"""`zoo launch`: a script that runs a planned training on a cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from zoo.cli.console import Parser, write
from zoo.cli.handover import Words, chosen, count_of, read_words
from zoo.spec.base import ConfigError

EXAMPLES = """\
  zoo launch MODEL h100_8x target=torchrun out=run.sh
  zoo launch MODEL h100_8x hardware.num_devices=64 seq_len=8192 target=slurm out=run.sbatch time=24:00:00
  zoo launch MODEL gb300_nvl72 devices_per_node=4 tp=2 pp=1 target=slurm out=run.sbatch train.steps=10000
  zoo launch MODEL h100_8x target=skypilot out=task.yaml data=files
  zoo launch MODEL h100_8x target=torchrun --dry-run"""
WHAT = """\
Write a script that starts `zoo train` with the layout that the planner chose, or with the one that is given.
Behind every setting stands who decided it.

keys:
  target=torchrun|slurm|skypilot      what starts the run
  out=FILE                            the script
  MODEL HARDWARE, tp= ... recompute=  as zoo plan takes them: what is given is not searched
  devices_per_node=                   where a domain of fast links is made of several nodes
  partition= account= time=           of target=slurm
  accelerator=                        of target=skypilot: its name of the chip
  train.*, data=, optimizer.*, ...    further settings of zoo train"""
TARGETS = ("torchrun", "slurm", "skypilot")
OWN = {"slurm": ("partition", "account", "time"), "skypilot": ("accelerator",)}


def run(arguments: Sequence[str]) -> None:
    """Write the script, or show the command that it runs."""
    parser = Parser("launch", "MODEL HARDWARE target=TARGET out=FILE [key=value ...] [--dry-run]", WHAT, EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="MODEL", help="a model, a machine, and settings")
    parser.add_argument("--dry-run", action="store_true", help="print the command of a node instead of writing")
    given = parser.read(arguments)
    keys = ("target", "out", "devices_per_node", *(key for keys in OWN.values() for key in keys))
    words = read_words("launch", given.words, keys)
    target = chosen("launch", words.own, TARGETS)
    for owner, owned in OWN.items():
        for key in owned:
            if key in words.own and owner != target:
                raise ConfigError(f"{key}: found {words.own[key]!r}; it goes with target={owner}")
    if "out" not in words.own and not given.dry_run:
        raise ConfigError("out: missing; give it a value: out=FILE; or --dry-run")
    text, command, summary = script(words, target)
    if given.dry_run:
        sys.stdout.write(command)
        return
    path = Path(words.own["out"]).expanduser()
    put(path, text, executable=target != "skypilot")
    write(*summary, f"written: {path}")


def script(words: Words, target: str) -> tuple[str, str, list[str]]:
    """The script, the command that it runs on one node, and what was planned.

    Raises:
        ConfigError: something that was typed is wrong.
    """
    from zoo.handover import skypilot, slurm, torchrun
    from zoo.handover.fields import Field
    from zoo.handover.hand import hand_over
    from zoo.handover.launch import ZOO, Nodes, train_words

    settings, own = words.settings, words.own
    hand = hand_over(ZOO, settings.model, settings.hardware, settings.overrides, words.options())
    nodes = Nodes.of(hand.question.machine, count_of(own, "devices_per_node"))
    settings_of_train = train_words(hand, words.train)
    plain = torchrun.script(hand, settings_of_train, nodes)
    if target == "slurm":
        asked = [Field(key, own[key], "user") for key in OWN["slurm"] if key in own]
        text = slurm.script(hand, settings_of_train, nodes, asked)
    elif target == "skypilot":
        text = skypilot.task(hand, settings_of_train, nodes, own.get("accelerator"))
    else:
        text = plain
    return text, _command(plain), list(hand.summary())


def _command(text: str) -> str:
    """What the script prints when it is asked to run nothing."""
    environment = {"MASTER_ADDR": "$MASTER_ADDR", "RUN_ID": "$RUN_ID", "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(["bash", "-s", "--", "--dry-run"], input=text, env=environment, capture_output=True, text=True)
    return ran.stdout


def put(path: Path, text: str, executable: bool = False) -> None:
    """Write a file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if executable:
            path.chmod(path.stat().st_mode | 0o111)
    except OSError as error:
        raise ConfigError(f"out: found {str(path)!r}; it cannot be written: {error.strerror}") from None
