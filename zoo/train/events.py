"""What a training run tells its reporters: plain values, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class LayerHealth:
    """Routing of one MoE layer since the last report."""

    layer: int
    load: tuple[int, ...]
    """Choices that each expert received."""
    entropy: float
    """Entropy of the load over ln(num_experts): 1 when even, 0 when one expert takes all."""
    max_violation: float
    """MaxVio (arXiv:2408.15664): (largest load - mean load) / mean load."""
    num_dead: int
    """Experts that no token chose."""


@dataclass(frozen=True)
class Predicted:
    """What the plan expects of a run; None: nothing is known of it."""

    step_time_s: float | None
    peak_memory_gib: float | None
    """Of the tensors of a step."""
    mfu: float | None


@dataclass(frozen=True)
class RunStarted:
    """Sent once, before the first step."""

    run_dir: Path
    model_name: str
    num_params: int
    num_active_params: int
    hardware: str
    choices: tuple[str, ...]
    """One line per decision taken for the user (precision, kernels, ...), with its reason."""
    corpus: str
    num_steps: int
    first_step: int
    """Above 0 when the run resumes."""
    tokens_per_step: int
    baselines: dict[str, float] = field(default_factory=dict)
    """Held-out bits per byte of simple models, by name."""
    predicted: Predicted | None = None


@dataclass(frozen=True)
class StepDone:
    """Sent after every optimizer step."""

    step: int
    """Steps done so far, this one included."""
    loss: float
    """Mean cross-entropy of the step's tokens, nats per token."""
    losses: dict[str, float]
    """Every term of the objective by name, `cross_entropy` among them, before coefficients."""
    bits_per_byte: float
    learning_rate: float
    grad_norm: float
    step_time_s: float
    tokens_per_s: float
    mfu: float | None
    """Model FLOPs per second over the measured matrix-multiply peak of this machine; None when it is not known."""
    routing: tuple[LayerHealth, ...]
    skipped: bool = False
    """A loss or a gradient was no number: the weights are as before."""
    num_tokens: int | None = None
    """Targets of the step; None: as `RunStarted.tokens_per_step` says."""
    noise_scale_tokens: float | None = None
    """The gradient noise scale (`zoo.train.noise`); None: not measured."""


@dataclass(frozen=True)
class Alerted:
    """Sent when something is wrong with the run, after the step that shows it."""

    step: int
    """Steps done."""
    name: str
    """One of those in `zoo.train.watch`."""
    message: str
    since: int
    """The first step that shows it."""


@dataclass(frozen=True)
class RolledBack:
    """Sent when the run has gone back to a checkpoint."""

    step: int
    """Steps done, those of the checkpoint."""
    from_step: int
    """Steps done before."""
    alert: str
    """Name of the alert."""
    message: str


@dataclass(frozen=True)
class Evaluated:
    """Sent after each evaluation on held-out text."""

    step: int
    loss: float
    bits_per_byte: float
    num_tokens: int
    time_s: float
    average_loss: float | None = None
    """Of the moving average of the weights; None: none is kept."""
    average_bits_per_byte: float | None = None


@dataclass(frozen=True)
class RunFinished:
    """Sent once, after the last step or an interruption."""

    step: int
    num_steps: int
    reason: str
    """`done`, `interrupted`."""
    train_time_s: float
    last_eval: Evaluated | None
    baselines: dict[str, float]
    sample: str
    """What the model writes after the prompt; empty when sampling is off."""
    files: tuple[Path, ...]
    sample_prompt: str = ""
    """What the sample goes on from."""
    step_time_s: float | None = None
    """Median of the steps; None: there was none."""
    mfu: float | None = None
    """At that step time."""
    peak_memory_gib: float | None = None
    """Most that the device held of this run, above what was there before the model; None: not known."""
    predicted: Predicted | None = None


class Reporter(Protocol):
    """Receives the events of a run. Reporters never change the run."""

    def started(self, event: RunStarted) -> None: ...

    def step_done(self, event: StepDone) -> None: ...

    def evaluated(self, event: Evaluated) -> None: ...

    def alerted(self, event: Alerted) -> None: ...

    def rolled_back(self, event: RolledBack) -> None: ...

    def finished(self, event: RunFinished) -> None: ...

    def close(self) -> None:
        """Release what the reporter holds; called also when the run fails."""
