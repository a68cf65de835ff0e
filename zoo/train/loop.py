"""The training loop: steps, evaluations, checkpoints, and what the reporters hear of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from zoo.blocks.base import Context
from zoo.data.batches import heldout_windows
from zoo.data.packing import packed
from zoo.spec.base import ConfigError
from zoo.spec.run import RunSpec
from zoo.train.assembly import Assembly, assemble
from zoo.train.crew import Alone, Crew
from zoo.train.detectors import SPAN
from zoo.train.ema import average_of
from zoo.train.errors import TrainingError
from zoo.train.events import Alerted, Evaluated, Reporter, RolledBack, RunFinished, RunStarted, StepDone
from zoo.train.guard import Guard
from zoo.train.metrics_file import METRICS
from zoo.train.noise import NoiseScale
from zoo.train.optim import set_lr
from zoo.train.plots import write_plots
from zoo.train.provenance import versions_here, write_provenance
from zoo.train.rundir import (
    Checkpoint,
    check_resumable,
    find_checkpoints,
    good_checkpoint,
    remove_after,
    sound_checkpoint,
)
from zoo.train.schedule import lr_ratio
from zoo.train.signals import StopSignal
from zoo.train.trainer import (
    Batch,
    MakeContext,
    RoutingCounter,
    StepResult,
    bits_per_byte,
    evaluate,
    sound_weights,
)


def train(
    run: RunSpec,
    run_dir: Path,
    reporters: Sequence[Reporter] = (),
    stop: StopSignal | None = None,
    crew: Crew | None = None,
) -> RunFinished:
    """Train as `run` says, in `run_dir`, with the processes of `crew` (None: this one alone).

    After SIGINT or SIGTERM the step is finished, a checkpoint saved, and the result's reason is `interrupted`; `stop`
    then says which signal it was. The reporters are told, not closed.

    Raises:
        ConfigError: the settings do not fit the data, the machine or the checkpoint to resume from.
        TrainingError: too many steps had a loss or a gradient that is no number, or the disk takes nothing more.
    """
    try:
        session = Session(run, run_dir, reporters, crew)
        with stop or StopSignal() as stop:
            return session.run_until(stop)
    except OSError as error:
        raise TrainingError(f"{run_dir}: {error}; what was saved of the run is sound") from error


class Session:
    """One process's part of a run."""

    def __init__(self, run: RunSpec, run_dir: Path, reporters: Sequence[Reporter], crew: Crew | None = None) -> None:
        self.run = run
        self.run_dir = run_dir
        self.reporters = reporters
        self.crew: Crew = crew or Alone()
        checkpoint, notes = self.crew.share(self._find_checkpoint)
        self.parts: Assembly = assemble(run, checkpoint.state() if checkpoint else None, self.crew)
        if run.train.noise_scale and self.parts.placement.layout.pp > 1:
            raise ConfigError(
                "train.noise_scale: found true; the stages of a pipeline take whole batches; leave it out"
            )
        self.noise = NoiseScale()
        self.counter = RoutingCounter(self.crew.moe_layers(self.parts.model))
        train, corpus = run.train, self.parts.corpus
        self.batches = self.crew.batches(corpus.train, run, self.parts.placement)
        apart = train.packing == "documents"
        self.context: MakeContext = partial(packed, boundary=corpus.boundary) if apart else Context.of
        windows = heldout_windows(corpus.heldout, train.seq_len, train.eval_tokens)
        self.windows = self.crew.windows(windows, self.parts.placement)
        self.step = 0
        """Optimizer steps done."""
        self.saved_step = 0
        self.last_eval: Evaluated | None = None
        self.step_times: list[float] = []
        """Of this session, seconds."""
        self.guard = Guard(run, self.parts, self.crew, self.batches, self.context)
        if checkpoint:
            notes = self._restore(checkpoint) + notes
        self.versions = versions_here()
        self.provenance = write_provenance(run, run_dir) if self.crew.rank == 0 else []
        self._tell("started", self._started(notes))
        self.start_time = time.perf_counter()

    def run_until(self, stop: StopSignal) -> RunFinished:
        """Train to the last step or to the end of the step in which `stop` comes."""
        train, checkpoint = self.run.train, self.run.checkpoint
        while self.step < train.steps and not self.crew.stopping(stop):
            alerts = self._train_step()
            if alerts and self._go_back(alerts):
                continue
            if train.eval_every and self.step % train.eval_every == 0:
                self._evaluate()
            if checkpoint.every and self.step % checkpoint.every == 0:
                self._save()
        if self.step > self.saved_step:
            self._save(last=True)
        if self.step < train.steps:
            return self._finish("interrupted")
        if self.last_eval is None or self.last_eval.step < self.step:
            self._evaluate()
        return self._finish("done")

    def _train_step(self) -> list[Alerted]:
        """One step; what is wrong with it."""
        start = time.perf_counter()
        run, parts = self.run, self.parts
        # Whatever a step draws is a function of the seed and the step: resuming needs no state of a generator.
        torch.manual_seed((run.train.seed * 1_000_003 + self.step) % 2**63)
        inputs, targets = self._read(self.guard.course.batch_after(self.step))
        batch = inputs.to(parts.device), targets.to(parts.device)
        size = parts.placement.micro_batch
        small_norm = self._norm_of_part(batch) if run.train.noise_scale and self._reports(self.step + 1) else None
        losses = self.crew.accumulate(parts.model, batch, size, parts.autocast, self.context)
        result = StepResult(losses, self.crew.clip_gradients(parts.model.parameters(), run.train.clip_norm))
        if small_norm is not None:
            tokens_per_row = run.train.seq_len * parts.placement.layout.dp
            small, big = self._part(len(inputs)) * tokens_per_row, len(inputs) * tokens_per_row
            self.noise.take(small_norm, small, result.grad_norm, big)
        self.crew.share_counts(parts.model)
        ratio = lr_ratio(run.schedule, self.step, run.train.steps)
        lr = run.optimizer.lr * ratio
        alerts = self.guard.look(self.step + 1, result, lr)
        if run.train.watch.rollbacks:  # all go back, or none
            alerts = self.crew.share(partial(list, alerts))
        set_lr(parts.optimizers, ratio)
        if result.finite:
            self.guard.update()
            self.counter.step_done()
        else:
            self.counter.step_skipped()
        for optimizer in parts.optimizers:
            optimizer.zero_grad()
        self.step += 1
        num_tokens = inputs.numel() * parts.placement.layout.dp
        self._tell("step_done", self._step_done(result, lr, time.perf_counter() - start, num_tokens))
        for alert in alerts:
            self._tell("alerted", alert)
        return alerts

    def _reports(self, step: int) -> bool:
        return step % self.run.train.log_every == 0 or step == self.run.train.steps

    def _part(self, rows: int) -> int:
        """Of the rows of a step those whose gradient alone is measured."""
        size = self.parts.placement.micro_batch
        return size if size < rows else rows // 2

    def _norm_of_part(self, batch: Batch) -> float:
        """The norm of the gradient of the first rows alone; nothing of it stays."""
        model, rows = self.parts.model, self._part(len(batch[0]))
        first = (batch[0][:rows], batch[1][:rows])
        self.crew.accumulate(
            model, first, min(rows, self.parts.placement.micro_batch), self.parts.autocast, self.context
        )
        norm = self.crew.clip_gradients(model.parameters(), None)
        self.counter.step_skipped()
        for optimizer in self.parts.optimizers:
            optimizer.zero_grad()
        return norm

    def _read(self, batch: int) -> Batch:
        """A batch; when the text cannot be read any more, what was learned so far is saved."""
        try:
            return self.batches.batch(batch)
        except (ConfigError, OSError) as error:
            if self.crew.size > 1 or self.step == self.saved_step:
                raise
            self._save()
            saved = f"a checkpoint of step {self.saved_step} is saved"
            raise ConfigError(f"{error}; {saved}, from which checkpoint.resume={self.run_dir} goes on") from None

    def _go_back(self, alerts: Sequence[Alerted]) -> bool:
        """Back to the last checkpoint from before it went wrong, if the settings allow it; whether that was done."""
        allowed = self.run.train.watch.rollbacks
        if self.guard.rollbacks >= allowed:
            return False
        since, from_step = min(alert.since for alert in alerts), self.step
        # What shows at a step was done by the updates before it.
        checkpoint = self.crew.share(partial(good_checkpoint, self.run_dir, since - SPAN))
        if checkpoint is None:
            message = f"no good checkpoint from before step {since:,} to go back to"
            self._tell("alerted", Alerted(from_step, "no_rollback", message, since))
            return False
        rollbacks, course = self.guard.rollbacks + 1, self.guard.course
        self._take(checkpoint)
        course.turn(self.step, from_step)
        self.guard.rollbacks, self.guard.course = rollbacks, course
        self.crew.share(partial(remove_after, self.run_dir, self.step))
        message = (
            f"{alerts[0].name} at step {from_step:,}: on from step {self.step:,} with the text after it "
            f"(rollback {rollbacks} of {allowed})"
        )
        self._tell("rolled_back", RolledBack(self.step, from_step, alerts[0].name, message))
        return True

    def _step_done(self, result: StepResult, lr: float, step_time_s: float, num_tokens: int) -> StepDone:
        parts = self.parts
        tokens_per_s = num_tokens / step_time_s
        self.step_times.append(step_time_s)
        reports = self._reports(self.step)
        loss = result.losses["cross_entropy"]
        return StepDone(
            step=self.step,
            loss=loss,
            losses=result.losses,
            bits_per_byte=bits_per_byte(loss, parts.corpus.train_bytes_per_token),
            learning_rate=lr,
            grad_norm=result.grad_norm,
            step_time_s=step_time_s,
            tokens_per_s=tokens_per_s,
            mfu=parts.mfu(tokens_per_s),
            routing=self.counter.report() if reports else (),
            skipped=not result.finite,
            num_tokens=num_tokens,
            noise_scale_tokens=self.noise.tokens if reports and self.run.train.noise_scale else None,
        )

    def _evaluate(self) -> None:
        found, average = self._evaluation(), average_of(self.parts.optimizers)
        if average is not None:
            with average.swapped():
                averaged = self._evaluation()
            bits = averaged.bits_per_byte
            found = replace(found, average_loss=averaged.loss, average_bits_per_byte=bits)
        self.last_eval = found
        self._tell("evaluated", found)

    def _evaluation(self) -> Evaluated:
        parts = self.parts
        found = evaluate(
            parts.model,
            self.windows,
            batch_size=parts.placement.micro_batch,
            autocast=parts.autocast,
            step=self.step,
            bytes_per_token=parts.corpus.heldout_bytes_per_token,
            context=self.context,
        )
        self.crew.evaluated(parts.model)
        return found

    def _save(self, last: bool = False) -> None:
        """Write a checkpoint. When that fails the run goes on, and the checkpoints of before stay.

        Raises:
            TrainingError: it was the `last` one.
        """
        if self.crew.largest(float(not sound_weights(self.parts.model))):
            message = "the weights are no longer finite: they are not saved"
            self._tell("alerted", Alerted(self.step, "nonfinite", message, self.step))
            return
        state = {
            "compute": self.parts.compute,
            **self.parts.placement.decided(),
            "corpus_sha256": self.parts.corpus.sha256,
            "routing": self.counter.state(),
            "noise": self.noise.state(),
            "settings": self.run.to_dict(),
            "versions": self.versions,
            "good": self.guard.watch.calm(self.step),
            "guard": self.guard.state(),
        }
        parts, keep = self.parts, self.run.checkpoint.keep
        try:
            self.crew.save(self.run_dir, self.step, parts.model, parts.optimizers, state, keep)
        except OSError as error:
            message = f"the checkpoint of step {self.step} cannot be written: {error}; the one of step "
            message += f"{self.saved_step} is the newest" if self.saved_step else "it would have been the first"
            if last:
                advice = f"free some space and go on with checkpoint.resume={self.run_dir}"
                raise TrainingError(f"{message}; {advice}") from error
            self._tell("alerted", Alerted(self.step, "write_failed", message, self.step))
        else:
            self.saved_step = self.step

    def _find_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint of the run directory, if the settings say to go on from it; notes for the user."""
        checkpoints, notes = find_checkpoints(self.run_dir)
        resume = self.run.checkpoint.resume
        if resume == "never" and checkpoints:
            raise ConfigError(
                f"checkpoint.resume: found 'never'; {self.run_dir} holds checkpoints of another run; "
                "continue that run with checkpoint.resume=auto, or choose another hydra.run.dir"
            )
        if resume == "never" or (resume == "auto" and not checkpoints and not notes):
            return None, notes
        return sound_checkpoint(self.run_dir)

    def _restore(self, checkpoint: Checkpoint) -> list[str]:
        """Continue from a checkpoint; notes for the user."""
        notes = check_resumable(checkpoint, self.run.to_dict(), self.parts.corpus.sha256)
        self._take(checkpoint)
        return [f"resumed from {checkpoint.path.name}", *notes]

    def _take(self, checkpoint: Checkpoint) -> None:
        """Become what a checkpoint holds."""
        state = checkpoint.state()
        self.crew.load(checkpoint, self.parts.model, self.parts.optimizers)
        self.counter.restore(state["routing"])
        self.noise.restore(state.get("noise", (0.0, 0.0)))
        self.guard.restore(state.get("guard", {}))
        self.step = self.saved_step = checkpoint.step

    def _started(self, notes: Sequence[str]) -> RunStarted:
        model, params = self.run.model, self.run.model.params()
        return RunStarted(
            run_dir=self.run_dir,
            model_name=model.name,
            num_params=params.total,
            num_active_params=params.active,
            hardware=self.parts.hardware,
            choices=(*self.parts.choices, *notes),
            corpus=self.parts.corpus.description,
            num_steps=self.run.train.steps,
            first_step=self.step,
            tokens_per_step=self.run.train.tokens_per_step,
            baselines=self.parts.baselines,
            predicted=self.parts.predicted(self.run.train.tokens_per_step),
        )

    def _finish(self, reason: str) -> RunFinished:
        train = self.run.train
        sampled = reason == "done" and train.sample_tokens > 0
        prompt = train.sample_prompt or "\n"
        step_time_s = statistics.median(self.step_times) if self.step_times else None
        event = RunFinished(
            step=self.step,
            num_steps=train.steps,
            reason=reason,
            train_time_s=time.perf_counter() - self.start_time,
            last_eval=self.last_eval,
            baselines=self.parts.baselines,
            sample=self.parts.sample(prompt) if sampled else "",
            files=self._files(),
            sample_prompt=prompt if sampled else "",
            step_time_s=step_time_s,
            mfu=self.parts.mfu(train.tokens_per_step / step_time_s) if step_time_s else None,
            peak_memory_gib=self.crew.largest(self.parts.peak.gib()),
            predicted=self.parts.predicted(train.tokens_per_step),
        )
        self._tell("finished", event)
        return event

    def _files(self) -> tuple[Path, ...]:
        """What the run has written, pictures drawn first."""
        if self.crew.rank > 0:
            return ()
        metrics = self.run_dir / METRICS
        told = [metrics, *write_plots(self.run_dir)] if metrics.exists() else []
        checkpoints, _ = find_checkpoints(self.run_dir)
        return (*self.provenance, *told, *(checkpoint.path for checkpoint in checkpoints[-1:]))

    def _tell(self, what: str, event: RunStarted | StepDone | Alerted | RolledBack | Evaluated | RunFinished) -> None:
        for reporter in self.reporters:
            getattr(reporter, what)(event)
