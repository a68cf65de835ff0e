"""The command of a planned run, and the nodes that it runs on: what every script of `zoo launch` says."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from zoo.handover.fields import Field
from zoo.handover.hand import Hand, Target
from zoo.plan.question import DEGREES
from zoo.spec.base import ConfigError
from zoo.spec.hardware import HardwareSpec

ZOO = Target("zoo train", lambda spec, name: name in ("none", "full"), ("fp32", "bf16"))
OPTIMIZERS = ("adamw", "muon")
PLANNED = {
    "train.seq_len": "seq_len",
    "train.batch_size": "global_batch",
    "train.micro_batch": "micro_batch",
    "train.recompute": "recompute",
    "precision.compute": "precision",
    "hardware.num_devices": "hardware.num_devices",
    **{f"parallel.{name}": name for name in (*DEGREES, "type")},
}
"""Settings of `zoo train` that follow from the plan, and what to give instead of them."""
MOST_ON_A_NODE = 16
"""Devices of a domain of fast links that is taken for one node; larger ones are made of several."""


@dataclass(frozen=True)
class Nodes:
    """How the devices of a run are divided among computers."""

    count: int
    each: int
    """Devices of one."""
    origin: str
    """Who decided."""

    @classmethod
    def of(cls, machine: HardwareSpec, each: int | None = None) -> Nodes:
        """The nodes of a machine.

        Args:
            each: Devices of a node; absent: those of a domain of fast links.

        Raises:
            ConfigError: they cannot be told from the machine, or they do not divide its devices.
        """
        n, domain = machine.num_devices, min(machine.domain_size, machine.num_devices)
        if each is None and domain > MOST_ON_A_NODE:
            rule = f"a domain of {machine.name} has {machine.domain_size} devices in several nodes"
            raise ConfigError(f"devices_per_node: missing; {rule}: say how many one has, devices_per_node=4")
        origin = "user" if each else f"hardware {machine.name}: domain_size"
        each = each or domain
        if n % each:
            raise ConfigError(f"devices_per_node: found {each}; must divide the {n} devices (hardware.num_devices)")
        return cls(n // each, each, origin)


def train_words(hand: Hand, own: Sequence[str] = ()) -> list[Field]:
    """The settings that `zoo train` is given, each with its origin.

    Args:
        hand: The planned run.
        own: Settings that the user adds.

    Raises:
        ConfigError: one of them contradicts the plan, or does not exist.
    """
    for word in own:
        name = word.lstrip("+~").partition("=")[0]
        if name in PLANNED:
            raise ConfigError(f"{word}: the plan decides this; give {PLANNED[name]}=... instead")
    words = [*_what(hand), *_how(hand)]
    given = {word.lstrip("+").partition("=")[0] for word in own}
    if "checkpoint.resume" not in given:
        words.append(Field("checkpoint.resume", "auto", "zoo launch: who is started again goes on"))
    words += [Field(*_halves(word), "user") for word in own]
    _check(words)
    return words


def _what(hand: Hand) -> list[Field]:
    q, names = hand.question, hand.names
    words = [Field(group, names[group], "user") for group in ("model", "hardware")]
    words += [Field(*_halves(word), "user") for word in hand.overrides if "num_devices" not in word]
    words.append(Field("hardware.num_devices", q.machine.num_devices, hand.origin("num_devices")))
    if q.spec.mtp is not None:
        words.append(Field("model.mtp.enabled", str(hand.mtp).lower(), hand.origin("mtp")))
    return words


def _how(hand: Hand) -> list[Field]:
    q, best = hand.question, hand.best
    if q.optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer: found {q.optimizer!r}; zoo train has {', '.join(OPTIMIZERS)}")
    recompute = {"none": "none", "full": "layer"}[best.recompute]
    return [
        Field("precision.compute", best.precision, hand.origin("precision")),
        Field("parallel", "manual", "plan"),
        *(Field(f"parallel.{name}", getattr(best.layout, name), hand.origin(name)) for name in DEGREES),
        Field("optimizer", q.optimizer, hand.origin("optimizer")),
        Field("train.seq_len", best.seq_len, hand.origin("seq_len")),
        Field("train.batch_size", best.global_batch, hand.origin("global_batch")),
        Field("train.micro_batch", best.micro_batch, hand.origin("micro_batch")),
        Field("train.recompute", recompute, hand.origin("recompute")),
    ]


def in_shell(word: Field) -> str:
    """A setting as one word of a shell; an empty value removes a key, as in `~logger`."""
    return shlex.quote(word.name if word.value is None else f"{word.name}={word.value}")


def _halves(word: str) -> tuple[str, str | None]:
    name, equals, value = word.partition("=")
    return name, value if equals else None


def _check(words: Sequence[Field]) -> None:
    """Compose the configuration here, so that a mistake does not wait for a cluster."""
    from zoo.config import compose

    compose([f"{word.name}={word.value}" if word.value is not None else word.name for word in words])
