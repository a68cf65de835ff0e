"""Who works on a run: one process alone, or several together (`zoo.train.distributed`). The loop is the same for both.

What they do differently has one place here: which rows are whose, sums over all, and what is said and written by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import nn, optim

from zoo.adapt.lora import kept_of
from zoo.data.batches import Batches
from zoo.data.stream import Stream
from zoo.data.tokenizer import Tokens
from zoo.spec.run import RunSpec
from zoo.train import trainer
from zoo.train.checkpoint import load_checkpoint, save_checkpoint
from zoo.train.placement import Placement
from zoo.train.rundir import TENSORS, Checkpoint
from zoo.train.schedule import batch_sizes
from zoo.train.signals import StopSignal
from zoo.train.trainer import Autocast, Balanced, Batch, MakeContext

if TYPE_CHECKING:
    from zoo.decoder import Decoder

T = TypeVar("T")


class Rows(Protocol):
    """The training text as batches."""

    def batch(self, step: int) -> Batch:
        """The rows of a step that this process works on, its micro-batches one below the other."""
        ...


class Crew(Protocol):
    """The processes of a run, seen from one of them."""

    size: int
    rank: int
    """From 0: the one that decides, prints and writes what is written once."""

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on all; it is called nowhere else. Errors of settings are shared as well."""
        ...

    def in_turn(self, make: Callable[[], T]) -> T:
        """`make()`, first on one process of each machine, then on the others: they find what it has kept on disk."""
        ...

    def spread(self, make: Callable[[bool], Decoder], run: RunSpec, placement: Placement) -> Decoder:
        """The model, divided as its layout says.

        Args:
            make: The whole model; when it is given True, without numbers, on the meta device.
        """
        ...

    def moe_layers(self, model: Decoder) -> dict[int, Balanced]:
        """The mixtures of experts by the index of their layer, also those that are elsewhere."""
        ...

    def batches(self, tokens: Stream | Tokens, run: RunSpec, placement: Placement) -> Rows: ...

    def windows(self, windows: Batch, placement: Placement) -> Batch:
        """This process's rows of an evaluation, as many as every other's."""
        ...

    def accumulate(
        self, model: Decoder, batch: Batch, batch_size: int, autocast: Autocast, context: MakeContext
    ) -> dict[str, float]:
        """`zoo.train.trainer.accumulate`, over the rows of all."""
        ...

    def clip_gradients(self, parameters: Iterable[nn.Parameter], clip_norm: float | None) -> float:
        """`zoo.train.trainer.clip_gradients`, over the parts of all."""
        ...

    def share_counts(self, model: Decoder) -> None:
        """Make the routing counters of a step those of all."""
        ...

    def evaluated(self, model: Decoder) -> None:
        """After an evaluation: let go of what it has gathered."""
        ...

    def stopping(self, stop: StopSignal) -> bool:
        """Whether any process has been asked to stop; the same answer on all."""
        ...

    def save(
        self,
        run_dir: Path,
        step: int,
        model: Decoder,
        optimizers: Sequence[optim.Optimizer],
        state: Mapping[str, Any],
        keep: int,
    ) -> None: ...

    def load(self, checkpoint: Checkpoint, model: Decoder, optimizers: Sequence[optim.Optimizer]) -> None: ...

    def sampling(self, model: Decoder) -> Decoder | None:
        """The model in a form that writes text, on rank 0, after it was saved; None: it is too large for one process,
        or this is another rank."""
        ...

    def largest(self, value: float | None) -> float | None:
        """Of all."""
        ...


class Alone:
    """One process, which does everything."""

    size = 1
    rank = 0

    def share(self, make: Callable[[], T]) -> T:
        return make()

    def in_turn(self, make: Callable[[], T]) -> T:
        return make()

    def spread(self, make: Callable[[bool], Decoder], run: RunSpec, placement: Placement) -> Decoder:
        del run, placement
        return make(False)

    def moe_layers(self, model: Decoder) -> dict[int, Balanced]:
        return dict(model.moe_layers())

    def batches(self, tokens: Stream | Tokens, run: RunSpec, placement: Placement) -> Rows:
        del placement
        train = run.train
        shape = {"batch_size": train.batch_size, "seq_len": train.seq_len}
        return Batches(tokens, **shape, seed=train.seed, first_sizes=batch_sizes(train))

    def windows(self, windows: Batch, placement: Placement) -> Batch:
        del placement
        return windows

    def accumulate(
        self, model: Decoder, batch: Batch, batch_size: int, autocast: Autocast, context: MakeContext
    ) -> dict[str, float]:
        return trainer.accumulate(model, batch, batch_size, autocast, context)

    def clip_gradients(self, parameters: Iterable[nn.Parameter], clip_norm: float | None) -> float:
        return trainer.clip_gradients(parameters, clip_norm)

    def share_counts(self, model: Decoder) -> None:
        pass

    def evaluated(self, model: Decoder) -> None:
        pass

    def stopping(self, stop: StopSignal) -> bool:
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
        save_checkpoint(run_dir, step, kept_of(model), optimizers, state, keep)

    def load(self, checkpoint: Checkpoint, model: Decoder, optimizers: Sequence[optim.Optimizer]) -> None:
        if (checkpoint.path / TENSORS).is_file():  # written by several processes
            from zoo.parallel.checkpoint import load

            load(checkpoint.path, model, optimizers, alone=True)
        else:
            load_checkpoint(checkpoint, kept_of(model), optimizers)

    def sampling(self, model: Decoder) -> Decoder | None:
        return model

    def largest(self, value: float | None) -> float | None:
        return value
