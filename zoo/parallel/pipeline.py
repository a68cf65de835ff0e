"""Pipeline parallelism: the layers of a model divided among processes, and the schedules that pass micro-batches on."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from zoo.blocks.base import Context
from zoo.blocks.linear_loss import IGNORED
from zoo.decoder import Decoder, Losses
from zoo.parallel.legal import check_rows
from zoo.parallel.mesh import World
from zoo.parallel.shard import release, synchronize
from zoo.parallel.stage import Absent, Stage
from zoo.plan.stages import layers_of_pieces
from zoo.spec.base import ConfigError
from zoo.train.trainer import Autocast, Batch, MakeContext


class _Run(nn.Module):
    """Calls a stage, and hides from torch that it is sharded: when to gather what is for `synchronize` to say."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor, *, tokens: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = self.stage(x, tokens=tokens, targets=targets)
        return result


class _Place(PipelineStage):
    """Where a stage stands in the pipeline, for one shape of micro-batches."""

    def __init__(
        self, stage: Stage, num_stages: int, given: Tensor, passed: Tensor, weights: list[Tensor], in_flight: int | None
    ) -> None:
        """
        Args:
            given, passed: of the shape and dtype of what comes in and goes out.
            weights: of the micro-batches.
            in_flight: how many of them wait for their way back at the same time, which then come back one by one; None:
                not known.
        """
        world, device = stage.world, torch.device(stage.world.tokens.device_type)
        group = world.pp.get_group()
        super().__init__(_Run(stage), stage.index, num_stages, device, given, passed, group=group)
        self.stage, self.weights, self.in_flight = stage, weights, in_flight

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        # torch has a buffer for each micro-batch of a step; those that are not in flight together can share one.
        buffers = min(num_microbatches, self.in_flight or num_microbatches)
        super()._setup_forward_recv_info(buffers, has_backward)
        self.args_recv_info |= {index: self.args_recv_info[index % buffers] for index in range(num_microbatches)}

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        buffers = 1 if self.in_flight else num_microbatches
        super()._setup_backward_recv_info(buffers)
        self.chunks = num_microbatches
        self.grad_recv_info |= {index: self.grad_recv_info[index % buffers] for index in range(num_microbatches)}

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.stage.weight = self.weights[fwd_chunk_id]
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        synchronize(self.stage, self.stage.world, last=bwd_chunk_id == len(self.weights) - 1)
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)


class _Shape(NamedTuple):
    """Of a batch that is passed through the pipeline."""

    num_micro_batches: int
    rows: int
    seq_len: int
    training: bool


class Pipeline:
    """The stages of this process, and how micro-batches pass them."""

    def __init__(self, model: Decoder, world: World) -> None:
        """Take away from `model` what other processes have. Every process has it whole before, or its meta."""
        layout, place = world.layout, world.pp.get_local_rank()
        self.world, self.num_stages, self.d_model = world, layout.pp * layout.vp, model.spec.d_model
        self.dtype = model.embed.weight.dtype
        """Of the residual stream."""
        pieces = layers_of_pieces(len(model.layers), self.num_stages)
        own = range(place, self.num_stages, layout.pp)
        self.model, self.is_first, self.is_last = model, 0 in own, self.num_stages - 1 in own
        self.shared_ends = model.head.weight is None or model.mtp is not None
        """The first stage and the last have the embedding."""
        self._remove({layer for index in own for layer in pieces[index]})
        self.stages = [Stage(model, pieces[index], index, self.num_stages, world) for index in own]
        self._schedules: dict[bool, tuple[_Shape, Any, list[Tensor]]] = {}

    def _remove(self, kept: set[int]) -> None:
        model = self.model
        if not (self.is_first or (self.is_last and self.shared_ends)):
            model.embed = cast(Any, Absent())
        if not self.is_last:
            model.norm, model.head, model.mtp = cast(Any, Absent()), cast(Any, Absent()), None
        for layer in set(range(len(model.layers))) - kept:
            model.layers[layer] = Absent()

    def accumulate(
        self, batch: Batch, batch_size: int, autocast: Autocast, make_context: MakeContext = Context.of
    ) -> dict[str, float]:
        """As `zoo.parallel.step.accumulate`; gradients of an embedding on both ends are still in two parts.

        Raises:
            ConfigError: the rows do not make equal micro-batches, or too few or too many for the schedule.
        """
        self._pass(batch, batch_size, autocast, make_context, training=True)
        return self._terms()[1]

    def loss(self, tokens: Tensor, targets: Tensor, context: Context | None = None) -> Losses:
        """As `Decoder.loss`, the same on all stages. Without gradients.

        Raises:
            RuntimeError: gradients are wanted: of these, each stage makes its own (`accumulate`).
        """
        if torch.is_grad_enabled():
            raise RuntimeError("a pipeline has no loss to call backward on: zoo.parallel.accumulate makes gradients")
        # What is cast around this call is cast inside it.
        counts = self._pass((tokens, targets), len(tokens), nullcontext, lambda x: context or Context.of(x), False)
        for stage in self.stages:
            release(stage)
        total, terms = self._terms()
        wide = partial(torch.tensor, dtype=torch.float64, device=tokens.device)
        return Losses(wide(total), {name: wide(value) for name, value in terms.items()}, counts.sum())

    def share_ends(self) -> None:
        """Add up the gradients of an embedding that both ends have."""
        if not self.shared_ends or not (self.is_first or self.is_last):
            return
        group, size = self.world.pp.get_group(), self.world.pp.size()
        other = dist.get_global_rank(group, size - 1 if self.is_first else 0)
        for parameter in self.model.embed.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            own = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            theirs = torch.empty_like(own)
            exchange = [dist.P2POp(dist.isend, own.contiguous(), other, group)]
            exchange.append(dist.P2POp(dist.irecv, theirs, other, group))
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            own += theirs

    def _pass(
        self, batch: Batch, batch_size: int, autocast: Autocast, make_context: MakeContext, training: bool
    ) -> Tensor:
        """Pass all micro-batches through all stages; the targets [n] that count in each, of all processes."""
        inputs, targets = batch
        if len(inputs) % batch_size:
            raise ConfigError(
                f"train.batch_size: found {batch_size}; with layout.pp, {self.world.layout.pp}, it must divide the "
                f"{len(inputs)} rows of a process"
            )
        first_rows = inputs[:batch_size]
        check_rows(first_rows, make_context(first_rows), self.world.layout)
        shape = _Shape(len(inputs) // batch_size, batch_size, inputs.shape[1], training)
        schedule, weights = self._schedule(shape)
        counts = (targets != IGNORED).view(shape.num_micro_batches, -1).sum(1)
        counts = self.world.sum_over_rows(counts)
        weights[:] = list(counts / max(1, int(counts.sum())))
        for stage in self.stages:
            stage.begin(autocast, make_context)
        step = schedule.step if training else schedule.eval
        given = [inputs] if self.is_first else []
        step(*given, target=targets, tokens=inputs, targets=targets, return_outputs=False)
        return counts

    def _schedule(self, shape: _Shape) -> tuple[Any, list[Tensor]]:
        """The schedule for batches of a shape, and the weights of its micro-batches, which are to be filled."""
        known = self._schedules.get(shape.training)
        if known is None or known[0] != shape:
            weights: list[Tensor] = []
            places = [self._place(stage, shape, weights) for stage in self.stages]
            known = self._schedules[shape.training] = (shape, self._order(places, shape), weights)
        return known[1], known[2]

    def _place(self, stage: Stage, shape: _Shape, weights: list[Tensor]) -> _Place:
        layout = self.world.layout
        size = (shape.rows, shape.seq_len // (layout.cp * layout.tp), self.d_model)
        stream = torch.empty(size, dtype=self.dtype, device="meta", requires_grad=True)
        tokens = torch.empty(shape.rows, shape.seq_len, dtype=torch.int64, device="meta")
        objective = torch.empty((), dtype=self.dtype, device="meta", requires_grad=True)
        given, passed = tokens if stage.is_first else stream, objective if stage.is_last else stream
        in_flight = None
        if len(self.stages) == 1:  # 1F1B, or all before the first comes back
            few = shape.num_micro_batches < self.num_stages
            in_flight = shape.num_micro_batches if few else self.num_stages - stage.index
        return _Place(stage, self.num_stages, given, passed, weights, in_flight)

    def _order(self, places: list[_Place], shape: _Shape) -> Any:
        count, pp = shape.num_micro_batches, self.world.layout.pp
        settings: dict[str, Any] = {"n_microbatches": count, "scale_grads": False}
        settings["loss_fn"] = (lambda objective, targets: objective) if shape.training else None
        if len(places) > 1:
            if count % max(1, count // pp):
                raise ConfigError(
                    f"layout.vp: found {len(places)}; the {count} micro-batches of a step do not go through pieces of "
                    f"{pp} stages in equal rounds: make them a multiple of {pp}, or set vp to 1"
                )
            return ScheduleInterleaved1F1B(list(places), **settings)
        # With fewer micro-batches than stages all are on their way before the first comes back.
        return (Schedule1F1B if count >= pp else ScheduleGPipe)(places[0], **settings)

    def _terms(self) -> tuple[float, dict[str, float]]:
        """The objective, and its terms by name, of all micro-batches, stages and processes."""
        device = torch.device(self.world.tokens.device_type)
        sums, counts = Counter[str](), Counter[str]()
        for stage in self.stages:
            values = torch.zeros(1 + len(stage.sums), dtype=torch.float64, device=device)
            for index, value in enumerate((stage.total, *stage.sums.values())):
                values[index] += value
            sums.update(dict(zip(("", *stage.sums), self.world.sum_over_tokens(values).tolist(), strict=True)))
            counts.update(stage.counts)
        parts: list[Any] = [None] * self.world.pp.size()
        dist.all_gather_object(parts, (sums, counts), group=self.world.pp.get_group())
        for other_sums, other_counts in parts[1:]:
            parts[0][0].update(other_sums)
            parts[0][1].update(other_counts)
        sums, counts = parts[0]
        names = sorted(counts, key=lambda name: name != "cross_entropy")  # which comes first, as elsewhere
        return sums[""], {name: sums[name] / counts[name] for name in names}


_ON_BOTH_ENDS: WeakSet[nn.Module] = WeakSet()
"""Embeddings that the first stage has and the last."""


def cut_layers(model: Decoder, world: World) -> Pipeline:
    """Divide the layers of `model` along pp, in place. Those that are not of this process become `Absent`."""
    pipeline = Pipeline(model, world)
    model.pipeline = pipeline  # type: ignore[assignment]
    if pipeline.shared_ends:
        _ON_BOTH_ENDS.add(model.embed)
    return pipeline


def pipeline_of(model: Decoder) -> Pipeline | None:
    """What `cut_layers` made of a model; None: its layers are not divided."""
    return getattr(model, "pipeline", None)


def stages_with(parameter: nn.Parameter) -> int:
    """How many stages have a parameter."""
    found = any(parameter is other for embed in _ON_BOTH_ENDS for other in embed.parameters())
    return 2 if found else 1
