"""Several processes that train one model together: what the loop asks of them (`zoo.train.crew.Crew`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule

from zoo.blocks.linear_loss import IGNORED
from zoo.data.batches import Batches
from zoo.data.stream import Stream
from zoo.data.tokenizer import Tokens
from zoo.decoder import Decoder, build
from zoo.hardware.local import available_gib
from zoo.parallel import World, parallelize, step
from zoo.parallel.checkpoint import load, pieces_of, save
from zoo.parallel.fill import fill
from zoo.spec.base import ConfigError
from zoo.spec.finetune import NoFinetune
from zoo.spec.moe import MoESpec
from zoo.spec.run import RunSpec
from zoo.train.crew import Rows
from zoo.train.placement import Placement
from zoo.train.rundir import Checkpoint, checkpoint_dir, partial_dir, publish, seal
from zoo.train.schedule import batch_sizes
from zoo.train.signals import StopSignal
from zoo.train.torchrun import Launch
from zoo.train.trainer import Autocast, Balanced, Batch, MakeContext

T = TypeVar("T")
WHOLE = 0.5
"""The part of the free memory for whole models: those that processes begin with, and one to write a sample."""


class Together:
    """The processes of torch's default process group."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.size, self.rank = launch, launch.size, launch.rank
        self._messages = dist.new_group(backend="gloo")
        # What a thread says of its files must not come between other messages.
        self._files = dist.new_group(backend="gloo", timeout=timedelta(hours=1))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._world: World | None = None
        self._far: dict[int, _FarExperts] = {}
        self._saved: Path | None = None
        self.asynchronous = False
        """Write checkpoints while training goes on."""

    def close(self) -> None:
        """Wait for what is still being written."""
        self._wait()
        self._thread.shutdown()

    @property
    def world(self) -> World:
        assert self._world is not None, "a model is spread first"
        return self._world

    def share(self, make: Callable[[], T]) -> T:
        answer: list[Any] = [None]
        if self.rank == 0:
            try:
                answer = [(make(), None)]
            except (ConfigError, OSError) as error:
                answer = [(None, error)]
        dist.broadcast_object_list(answer, src=0, group=self._messages)
        value, failure = answer[0]
        if failure is not None:
            raise failure
        return value

    def in_turn(self, make: Callable[[], T]) -> T:
        if self.launch.local_rank == 0:
            result = make()
            dist.barrier(self._messages)
            return result
        dist.barrier(self._messages)
        return make()

    def spread(self, make: Callable[[bool], Decoder], run: RunSpec, placement: Placement) -> Decoder:
        on_meta = self.share(lambda: self._is_large(run))
        model, kind = make(on_meta), run.hardware.chip.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._world = World.of(placement.layout, kind)
            specs = {index: moe.spec for index, moe in model.moe_layers().items()}
            model = parallelize(model, self._world)
        except ConfigError as error:  # there the degrees have no other name
            raise ConfigError(str(error).replace("layout.", "parallel.")) from None
        own, device = model.moe_layers(), torch.device(kind)
        if on_meta:
            fill(model, run.train.seed, device)
        self._far = {index: _FarExperts(spec, device) for index, spec in specs.items() if index not in own}
        return model

    def _is_large(self, run: RunSpec) -> bool:
        """Whether the whole model does not fit as often as there are processes on a machine."""
        room, dtype = available_gib("cpu"), 2 if run.precision.weights == "bf16" else 4
        return (
            isinstance(run.finetune, NoFinetune)
            and room is not None
            and run.model.params().total * dtype * self.launch.local_size > WHOLE * room * 2**30
        )

    def moe_layers(self, model: Decoder) -> dict[int, Balanced]:
        layers: dict[int, Balanced] = {**self._far, **model.moe_layers()}
        return dict(sorted(layers.items()))

    def batches(self, tokens: Stream | Tokens, run: RunSpec, placement: Placement) -> Rows:
        return OwnRows(tokens, run, placement, self.world.rows_index)

    def windows(self, windows: Batch, placement: Placement) -> Batch:
        return own_windows(windows, placement.micro_batch, placement.layout.dp, self.world.rows_index)

    def accumulate(
        self, model: Decoder, batch: Batch, batch_size: int, autocast: Autocast, context: MakeContext
    ) -> dict[str, float]:
        return step.accumulate(model, batch, batch_size, autocast, self.world, context)

    def clip_gradients(self, parameters: Iterable[nn.Parameter], clip_norm: float | None) -> float:
        return step.clip_gradients(parameters, clip_norm, self.world)

    def share_counts(self, model: Decoder) -> None:
        step.share_counts(model, self.world)
        if self.world.layout.pp > 1:
            self._share_far(self.moe_layers(model))

    def _share_far(self, layers: Mapping[int, Balanced]) -> None:
        """Let every stage of a pipeline know the counts of all."""
        if not layers:
            return
        own = [
            torch.zeros_like(moe.tokens_per_expert) if index in self._far else moe.tokens_per_expert
            for index, moe in layers.items()
        ]
        counts = torch.cat(own)
        dist.all_reduce(counts, group=self.world.pp.get_group())
        for (index, moe), total in zip(layers.items(), counts.split([len(part) for part in own]), strict=True):
            if index in self._far:
                moe.tokens_per_expert.copy_(total)

    def evaluated(self, model: Decoder) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def stopping(self, stop: StopSignal) -> bool:
        number = torch.tensor(stop.number)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._messages)
        stop.number = int(number)
        return stop.requested

    def save(
        self,
        run_dir: Path,
        step: int,
        model: Decoder,
        optimizers: Sequence[optim.Optimizer],
        state: Mapping[str, Any],
        keep: int,
    ) -> None:
        self._wait()
        folder = self.share(lambda: _fresh(partial_dir(run_dir, step)))

        def finish(sums: Mapping[str, int]) -> None:
            seal(folder, step, state, sums)
            publish(run_dir, step, keep)

        pieces = pieces_of(model, optimizers)
        self._saved = checkpoint_dir(run_dir, step)
        if self.asynchronous:
            copies = {name: piece.copied() for name, piece in pieces.items()}
            self._writing = self._thread.submit(self._write, folder, copies, finish)
        else:
            self._write(folder, pieces, finish)

    def _write(self, folder: Path, pieces: Mapping[str, Any], finish: Callable[[Mapping[str, int]], None]) -> None:
        try:
            save(folder, pieces, finish, self._files)
        except CheckpointException as error:
            if self.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            rank, (reason, _) = next(iter(error.failures.items()))
            raise OSError(f"process {rank}: {reason}") from None

    def _wait(self) -> None:
        """For the checkpoint that is being written; its error is raised here."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load(self, checkpoint: Checkpoint, model: Decoder, optimizers: Sequence[optim.Optimizer]) -> None:
        load(checkpoint.path, model, optimizers, self._messages, whole=self.world.layout.pp == 1)
        self._saved = checkpoint.path

    def sampling(self, model: Decoder) -> Decoder | None:
        self._wait()
        num_bytes = sum(parameter.nbytes for parameter in model.parameters()) * self.world.layout.pp
        room = available_gib("cpu")
        if self.rank > 0 or self._saved is None or (room is not None and num_bytes > WHOLE * room * 2**30):
            return None
        whole = build(model.spec, dtype=model.embed.weight.dtype, init=False)
        load(self._saved, whole, (), alone=True)
        return whole.to(model.embed.weight.device)

    def largest(self, value: float | None) -> float | None:
        most = torch.tensor(-1.0 if value is None else value)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._messages)
        return float(most) if most >= 0 else None


class _FarExperts:
    """Stands for the experts of a layer that another stage of the pipeline has: their counts are known here."""

    def __init__(self, spec: MoESpec, device: torch.device) -> None:
        self.spec = spec
        self.tokens_per_expert: Tensor = torch.zeros(spec.num_experts, dtype=torch.int64, device=device)

    def update_bias(self) -> None:
        """The other stage does."""


class OwnRows:
    """The rows of one of `layout.dp` groups of processes. Together they read the batches that one process reads alone:
    its micro-batches are divided among them."""

    def __init__(self, tokens: Stream | Tokens, run: RunSpec, placement: Placement, index: int) -> None:
        """
        Args:
            index: Of this group.
        """
        train, size = run.train, placement.micro_batch
        if train.batch_warmup and placement.layout.pp > 1:
            rule = "the stages of a pipeline take batches of one size; use parallel.pp=1, or train.batch_warmup=0"
            raise ConfigError(f"train.batch_warmup: found {train.batch_warmup}; {rule}")
        unit = size * placement.layout.dp
        first = [rows // unit for rows in batch_sizes(train, unit)] if train.batch_warmup else []
        self._number, self._first_ends = placement.num_micro_batches, list(accumulate(first, initial=0))
        self._batches = Batches(
            tokens,
            batch_size=size,
            seq_len=train.seq_len,
            seed=train.seed,
            rank=index,
            world_size=placement.layout.dp,
        )

    def batch(self, step: int) -> Batch:
        """Inputs and targets, int64 [micro-batches * rows, seq_len]."""
        parts = [self._batches.batch(micro) for micro in range(self._before(step), self._before(step + 1))]
        inputs, targets = zip(*parts, strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def _before(self, step: int) -> int:
        """Micro-batches of this group in all steps before this one."""
        later = step - (len(self._first_ends) - 1)
        return self._first_ends[-1] + later * self._number if later > 0 else self._first_ends[step]


def own_windows(windows: Batch, micro_batch: int, groups: int, index: int) -> Batch:
    """Of the rows of an evaluation those of one of several groups, each of which gets as many: rows without targets
    fill them up."""
    inputs, targets = windows
    missing = -len(inputs) % (micro_batch * groups)
    inputs = torch.cat([inputs, inputs.new_zeros(missing, inputs.shape[1])])
    targets = torch.cat([targets, targets.new_full((missing, targets.shape[1]), IGNORED)])
    own = [part.view(-1, groups, micro_batch, part.shape[1])[:, index].flatten(0, 1) for part in (inputs, targets)]
    return own[0], own[1]


def _fresh(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
