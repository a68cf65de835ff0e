"""What an exported configuration says about training beside the plan: steps, learning rate, clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zoo.handover.launch import PLANNED
from zoo.spec.base import ConfigError, Spec, choice_of, decode
from zoo.spec.train import AdamWSpec, CosineSpec, ScheduleSpec, TrainSpec, WSDSpec, duration_in_steps

CARRIED = ("steps", "clip_norm", "seed", "eval_every")
"""Settings below `train` that go over."""
OPTIMIZER = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Training:
    """The settings, and which of them were given."""

    train: TrainSpec
    optimizer: AdamWSpec
    schedule: ScheduleSpec
    given: frozenset[str]

    @classmethod
    def of(cls, words: Sequence[str], optimizer: str) -> Training:
        """Read settings of `zoo train`.

        Args:
            words: Those that the user gave.
            optimizer: The plan's.

        Raises:
            ConfigError: a setting is unknown, or does not go over.
        """
        if optimizer != "adamw":
            raise ConfigError(f"optimizer: found {optimizer!r}; zoo export writes adamw alone")
        given = set()
        for word in words:
            name = word.lstrip("+~").partition("=")[0].replace("/", ".")
            group, _, key = name.partition(".")
            if name in PLANNED:
                raise ConfigError(f"{word}: the plan decides this; give {PLANNED[name]}=... instead")
            if not (
                group == "schedule" or (group == "train" and key in CARRIED) or (group, key.split(".")[0]) in _OURS
            ):
                names = [f"train.{key}" for key in CARRIED] + [f"optimizer.{key}" for key in OPTIMIZER]
                raise ConfigError(f"{word}: zoo export does not carry it over; it does {', '.join(names)}, schedule.*")
            given.add(name)
        return cls(*_decoded(words), frozenset(given))

    def origin(self, name: str) -> str:
        """Who decided a setting."""
        group = name.partition(".")[0]
        if name in self.given or (group == "schedule" and "schedule" in self.given):
            return "user"
        option = {"train": "default", "optimizer": "adamw", "schedule": self.schedule.type}[group]
        return f"zoo's conf/{group}/{option}.yaml"

    @property
    def warmup(self) -> int:
        """Steps."""
        return duration_in_steps(self.schedule.warmup, self.train.steps)

    @property
    def decay(self) -> int:
        """Steps of the last part of a run, in which the rate falls."""
        if isinstance(self.schedule, WSDSpec):
            return duration_in_steps(self.schedule.decay, self.train.steps)
        return self.train.steps - self.warmup if isinstance(self.schedule, CosineSpec) else 0

    @property
    def min_ratio(self) -> float:
        """The last rate over the highest."""
        return float(getattr(self.schedule, "min_ratio", 1.0))

    @property
    def min_lr(self) -> float:
        """The last rate, without the noise of the product."""
        return float(f"{self.optimizer.lr * self.min_ratio:.12g}")


_OURS = {("optimizer", key) for key in OPTIMIZER}


class _Scheduled(Spec):
    schedule: choice_of(ScheduleSpec)  # type: ignore[valid-type]


def _decoded(words: Sequence[str]) -> tuple[TrainSpec, AdamWSpec, ScheduleSpec]:
    from zoo.config import compose
    from zoo.spec.composed import plain

    data = plain(compose(["optimizer=adamw", *words]))
    holder = decode(_Scheduled, {"schedule": data["schedule"]})
    return decode(TrainSpec, data["train"], "train"), decode(AdamWSpec, data["optimizer"], "optimizer"), holder.schedule
