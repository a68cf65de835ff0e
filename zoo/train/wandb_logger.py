"""Weights & Biases as a reporter. The package is imported only when a run asks for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.spec.base import ConfigError
from zoo.spec.train import WandbSpec
from zoo.train.events import Alerted, Evaluated, Predicted, RolledBack, RunFinished, RunStarted, StepDone
from zoo.train.routing import summary


class WandbReporter:
    """Writes below `run_dir/wandb`; nothing leaves the machine while `spec.mode` is `offline`.

    A resumed run goes on in its own online run. Offline it becomes another run of the same group: two parts under one
    id would overwrite each other when they are uploaded. Steps are a metric of their own, because Weights & Biases
    refuses to log a step a second time, which is what a resumed run does with those after its checkpoint.
    """

    def __init__(self, spec: WandbSpec, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Start the run.

        Args:
            config: Every setting of the run, as plain data.

        Raises:
            ConfigError: `online` without a login, or without an answer from the service.
        """
        online = spec.mode == "online"
        if not online:
            # Otherwise wandb reports about itself over the network, offline or not.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=spec.project,
                entity=spec.entity,
                name=spec.name or run_dir.name,
                mode=spec.mode,
                dir=run_dir,
                config=dict(config),
                group=run_dir.name,
                id=_online_id(run_dir) if online else None,
                resume="allow" if online else None,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            advice = "log in with `wandb login`, or choose logger.mode=offline"
            raise ConfigError(f"logger.mode: found {spec.mode!r}; wandb does not start: {error}; {advice}") from None
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._finished = False

    def started(self, event: RunStarted) -> None:
        self._run.summary.update(
            {
                "num_params": event.num_params,
                "num_active_params": event.num_active_params,
                "hardware": event.hardware,
                "corpus": event.corpus,
                **{f"baseline/{name}/bits_per_byte": bits for name, bits in event.baselines.items()},
                **_measures("predicted", event.predicted),
            }
        )

    def step_done(self, event: StepDone) -> None:
        metrics = {
            "step": event.step,
            "loss": event.loss,
            "bits_per_byte": event.bits_per_byte,
            "lr": event.learning_rate,
            "grad_norm": event.grad_norm,
            "tokens_per_s": event.tokens_per_s,
            "step_time_s": event.step_time_s,
        }
        if event.mfu is not None:
            metrics["mfu"] = event.mfu
        if event.noise_scale_tokens is not None:
            metrics["noise_scale_tokens"] = event.noise_scale_tokens
        if event.routing:
            total = summary(event.routing)
            metrics["routing/mean_entropy"] = total.mean_entropy
            metrics["routing/worst_max_violation"] = total.worst_max_violation
            metrics["routing/num_dead"] = total.num_dead
        for health in event.routing:
            prefix = f"routing/layer_{health.layer:02d}"
            metrics[f"{prefix}/entropy"] = health.entropy
            metrics[f"{prefix}/max_violation"] = health.max_violation
            metrics[f"{prefix}/num_dead"] = health.num_dead
        self._run.log(metrics)

    def evaluated(self, event: Evaluated) -> None:
        metrics = {"step": event.step, "held_out/loss": event.loss, "held_out/bits_per_byte": event.bits_per_byte}
        if event.average_loss is not None:
            metrics["held_out/average_loss"] = event.average_loss
        self._run.log(metrics)

    def alerted(self, event: Alerted) -> None:
        self._run.alert(title=event.name, text=f"step {event.step}: {event.message}", level="WARN")
        self._run.log({"step": event.step, f"alert/{event.name}": 1})

    def rolled_back(self, event: RolledBack) -> None:
        self._run.alert(title="rolled back", text=event.message)

    def finished(self, event: RunFinished) -> None:
        told = {"reason": event.reason, "sample": event.sample_prompt + event.sample}
        self._run.summary.update({**told, **_measures("measured", event)})
        self._finished = True

    def close(self) -> None:
        """Write everything out; a run that did not finish is marked as failed."""
        self._run.finish(exit_code=0 if self._finished else 1)


def _measures(prefix: str, event: Predicted | RunFinished | None) -> dict[str, float]:
    """What is predicted and measured alike, as far as it is known."""
    values = {name: getattr(event, name, None) for name in ("step_time_s", "peak_memory_gib", "mfu")}
    return {f"{prefix}/{name}": value for name, value in values.items() if value is not None}


def _online_id(run_dir: Path) -> str | None:
    """The id of the last online run in this directory: each one writes `wandb/run-<time>-<id>/run-<id>.wandb`."""
    logs = sorted((run_dir / "wandb").glob("run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    return logs[-1].stem.removeprefix("run-") if logs else None
