"""The training loop: steps, evaluations, checkpoints, and what the reporters hear of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from zoo.data.batches import Batches, heldout_windows
from zoo.spec.base import ConfigError
from zoo.spec.run import RunSpec
from zoo.train.assembly import Assembly, assemble
from zoo.train.checkpoint import load_checkpoint, save_checkpoint
from zoo.train.events import Evaluated, Reporter, RunFinished, RunStarted, StepDone
from zoo.train.metrics_file import METRICS
from zoo.train.optim import set_lr
from zoo.train.plots import write_plots
from zoo.train.provenance import versions_here, write_provenance
from zoo.train.rundir import Checkpoint, check_resumable, find_checkpoints, newest_checkpoint
from zoo.train.schedule import lr_ratio
from zoo.train.signals import StopSignal
from zoo.train.trainer import (
    RoutingCounter,
    StepResult,
    accumulate,
    bits_per_byte,
    clip_gradients,
    evaluate,
    refuse_nonfinite,
)


def train(
    run: RunSpec, run_dir: Path, reporters: Sequence[Reporter] = (), stop: StopSignal | None = None
) -> RunFinished:
    """Train as `run` says, in `run_dir`.

    After SIGINT or SIGTERM the step is finished, a checkpoint saved, and the result's reason is `interrupted`; `stop`
    then says which signal it was. The reporters are told, not closed.

    Raises:
        ConfigError: the settings do not fit the data, the machine or the checkpoint to resume from.
        TrainingError: a loss or a gradient is no number.
    """
    session = Session(run, run_dir, reporters)
    with stop or StopSignal() as stop:
        return session.run_until(stop)


class Session:
    """One process's part of a run."""

    def __init__(self, run: RunSpec, run_dir: Path, reporters: Sequence[Reporter]) -> None:
        self.run = run
        self.run_dir = run_dir
        self.reporters = reporters
        checkpoint, notes = self._find_checkpoint()
        self.parts: Assembly = assemble(run, checkpoint.state() if checkpoint else None)
        self.counter = RoutingCounter(self.parts.model.moe_layers())
        train, corpus = run.train, self.parts.corpus
        self.batches = Batches(
            corpus.train,
            batch_size=train.batch_size,
            seq_len=train.seq_len,
            seed=train.seed,
        )
        self.windows = heldout_windows(corpus.heldout, train.seq_len, train.eval_tokens)
        self.step = 0
        """Optimizer steps done."""
        self.saved_step = 0
        self.last_eval: Evaluated | None = None
        self.step_times: list[float] = []
        """Of this session, seconds."""
        if checkpoint:
            notes = self._restore(checkpoint) + notes
        self.provenance = write_provenance(run, run_dir)
        self._tell("started", self._started(notes))
        self.start_time = time.perf_counter()

    def run_until(self, stop: StopSignal) -> RunFinished:
        """Train to the last step or to the end of the step in which `stop` comes."""
        train, checkpoint = self.run.train, self.run.checkpoint
        while self.step < train.steps and not stop.requested:
            self._train_step()
            if train.eval_every and self.step % train.eval_every == 0:
                self._evaluate()
            if checkpoint.every and self.step % checkpoint.every == 0:
                self._save()
        if self.step > self.saved_step:
            self._save()
        if self.step < train.steps:
            return self._finish("interrupted")
        if self.last_eval is None or self.last_eval.step < self.step:
            self._evaluate()
        return self._finish("done")

    def _train_step(self) -> None:
        start = time.perf_counter()
        run, parts = self.run, self.parts
        # Whatever a step draws is a function of the seed and the step: resuming needs no state of a generator.
        torch.manual_seed((run.train.seed * 1_000_003 + self.step) % 2**63)
        inputs, targets = self.batches.batch(self.step)
        batch = inputs.to(parts.device), targets.to(parts.device)
        losses = accumulate(parts.model, batch, parts.placement.micro_batch, parts.autocast)
        result = StepResult(losses, clip_gradients(parts.model.parameters(), run.train.clip_norm))
        refuse_nonfinite(self.step + 1, result, parts.model)
        ratio = lr_ratio(run.schedule, self.step, run.train.steps)
        set_lr(parts.optimizers, ratio)
        for optimizer in parts.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.counter.step_done()
        self.step += 1
        self._tell("step_done", self._step_done(result, run.optimizer.lr * ratio, time.perf_counter() - start))

    def _step_done(self, result: StepResult, lr: float, step_time_s: float) -> StepDone:
        train, parts = self.run.train, self.parts
        tokens_per_s = train.tokens_per_step / step_time_s
        self.step_times.append(step_time_s)
        reports = self.step % train.log_every == 0 or self.step == train.steps
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
        )

    def _evaluate(self) -> None:
        parts = self.parts
        self.last_eval = evaluate(
            parts.model,
            self.windows,
            batch_size=parts.placement.micro_batch,
            autocast=parts.autocast,
            step=self.step,
            bytes_per_token=parts.corpus.heldout_bytes_per_token,
        )
        self._tell("evaluated", self.last_eval)

    def _save(self) -> None:
        state = {
            "compute": self.parts.compute,
            **self.parts.placement.decided(),
            "corpus_sha256": self.parts.corpus.sha256,
            "routing": self.counter.state(),
            "settings": self.run.to_dict(),
            "versions": versions_here(),
        }
        parts, keep = self.parts, self.run.checkpoint.keep
        save_checkpoint(self.run_dir, self.step, parts.model, parts.optimizers, state, keep)
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
        if resume == "never" or (resume == "auto" and not checkpoints):
            return None, notes
        return newest_checkpoint(self.run_dir), notes

    def _restore(self, checkpoint: Checkpoint) -> list[str]:
        """Continue from a checkpoint; notes for the user."""
        notes = check_resumable(checkpoint, self.run.to_dict(), self.parts.corpus.sha256)
        load_checkpoint(checkpoint, self.parts.model, self.parts.optimizers)
        self.counter.restore(checkpoint.state()["routing"])
        self.step = self.saved_step = checkpoint.step
        return [f"resumed from {checkpoint.path.name}", *notes]

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
            peak_memory_gib=self.parts.peak.gib(),
            predicted=self.parts.predicted(train.tokens_per_step),
        )
        self._tell("finished", event)
        return event

    def _files(self) -> tuple[Path, ...]:
        """What the run has written, pictures drawn first."""
        metrics = self.run_dir / METRICS
        told = [metrics, *write_plots(self.run_dir)] if metrics.exists() else []
        checkpoints, _ = find_checkpoints(self.run_dir)
        return (*self.provenance, *told, *(checkpoint.path for checkpoint in checkpoints[-1:]))

    def _tell(self, what: str, event: RunStarted | StepDone | Evaluated | RunFinished) -> None:
        for reporter in self.reporters:
            getattr(reporter, what)(event)
