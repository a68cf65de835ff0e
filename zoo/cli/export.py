"""`zoo export`: a model and its layout as another engine's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zoo.cli.console import Parser, write
from zoo.cli.handover import chosen, read_words
from zoo.cli.launch import put
from zoo.spec.base import ConfigError

EXAMPLES = """\
  zoo export MODEL h100_8x target=megatron_bridge out=bridge
  zoo export MODEL h100_8x hardware.num_devices=64 tp=4 seq_len=8192 target=torchtitan out=titan train.steps=10000"""
WHAT = """\
Write the model and the layout that the planner chose as the configuration of another engine, in one Python file.
Behind every field stands who decided it. What the target cannot express is refused.

keys:
  target=megatron_bridge|torchtitan   who trains
  out=FOLDER                          where recipe.py goes
  MODEL HARDWARE, tp= ... recompute=  as zoo plan takes them: what is given is not searched
  train.steps= optimizer.lr= schedule=wsd ...
                                      settings of zoo train that go over"""
TARGETS = ("megatron_bridge", "torchtitan")


def run(arguments: Sequence[str]) -> None:
    """Write the configuration."""
    parser = Parser("export", "MODEL HARDWARE target=TARGET out=FOLDER [key=value ...]", WHAT, EXAMPLES)
    parser.add_argument("words", nargs="*", metavar="MODEL", help="a model, a machine, and settings")
    given = parser.read(arguments)
    words = read_words("export", given.words, ("target", "out"))
    target = chosen("export", words.own, TARGETS)
    if "out" not in words.own:
        raise ConfigError("out: missing; give it a value: out=FOLDER")
    from zoo.handover import megatron_bridge, torchtitan
    from zoo.handover.hand import hand_over
    from zoo.handover.training import Training

    module = {"megatron_bridge": megatron_bridge, "torchtitan": torchtitan}[target]
    settings = words.settings
    hand = hand_over(module.TARGET, settings.model, settings.hardware, settings.overrides, words.options())
    text = module.recipe(hand, Training.of(words.train, hand.question.optimizer))
    path = Path(words.own["out"]).expanduser() / "recipe.py"
    put(path, text)
    write(*hand.summary(), f"written: {path}")
