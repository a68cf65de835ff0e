"""One training step of one process of many, on tensors without values, watched layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from zoo.blocks.embedding import Head
from zoo.blocks.moe import MoE
from zoo.blocks.norm import Norm
from zoo.decoder import Decoder, build
from zoo.dryrun import ledger
from zoo.dryrun.kernels import gpu_kernels, label_logits
from zoo.dryrun.ledger import Segment
from zoo.dryrun.meter import Meter
from zoo.dryrun.recompute import recomputed
from zoo.dryrun.stage import cut_ends
from zoo.parallel import World, accumulate, clip_gradients, parallelize, share_counts
from zoo.parallel.experts import planned_loads
from zoo.plan.layout import Layout
from zoo.spec.model import ModelSpec
from zoo.spec.pattern import compress
from zoo.spec.train import OptimizerSpec
from zoo.train.optim import build_optimizers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLIP = 1.0


@dataclass(frozen=True)
class Job:
    """What is rehearsed."""

    spec: ModelSpec
    layout: Layout
    seq_len: int
    micro_batch: int
    num_micro_batches: int
    recompute: str
    compute: str
    """`fp32` or `bf16`."""
    fused: bool
    optimizer: OptimizerSpec
    skew: float = 1.0
    """Rows that the experts of this process get, over the mean of all processes."""
    stage: int = 0
    """Of the pipeline."""


@dataclass
class Measured:
    """A step, as segments in the order of their names."""

    steps: dict[str, Segment] = field(default_factory=dict)
    """By `PART` of a step, `PART.MICRO_BATCH` or `PART.MICRO_BATCH.LAYER`."""
    base: dict[str, int] = field(default_factory=dict)
    """Bytes that are there before, by kind, those of layers aside."""
    layers: list[dict[str, int]] = field(default_factory=list)
    """The same of each layer."""
    mixtures: list[int] = field(default_factory=list)
    """How many mixtures of experts each layer has."""


def measure(job: Job, kinds: Sequence[str], rank: int = 0) -> Measured:
    """Rehearse a step with layers of these kinds, of at most three micro-batches: all between the first and the last
    are alike.

    Args:
        rank: of the process among those of its stage.
    """
    spec = job.spec.replace(layers=compress(tuple(kinds)))
    compute = None if job.compute == "fp32" else DTYPES[job.compute]
    layout = replace(job.layout, pp=1, vp=1)
    with _processes(layout.num_devices, rank):
        world = World.of(layout)
        model = build(spec, device="meta").train()
        shared = layout.dp * layout.cp > 1
        cut_ends(model, job.layout, job.stage, compute if compute and shared else torch.float32)
        parallelize(model, world, compute)
        return _Rehearsal(job, model, world).run()


@contextmanager
def _processes(number: int, rank: int) -> Iterator[None]:
    """A group of processes of which this one alone exists."""
    dist.init_process_group("fake", rank=rank, world_size=number, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        # They hold meshes, which equal those of the next rehearsal but whose groups are gone.
        _clear_sharding_prop_cache()
        _gen_transform_infos.cache_clear()


class _Rehearsal:
    def __init__(self, job: Job, model: Decoder, world: World) -> None:
        self.job, self.model, self.world = job, model, world
        self.measured = Measured()
        names = _axis_names(world)
        parts = recomputed(job.recompute)
        self.meter = Meter(job.fused, job.fused and "act" in parts, lambda name: names.get(name, "all"))
        model.recompute = "layer" if "full" in parts else "none"
        self.micro_batch = 0

    def run(self) -> Measured:
        job, model = self.job, self.model
        with ExitStack() as stack:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            model.to_empty(device="cpu")
            optimizers = self._prepare()
            batch = self._batch()
            stack.enter_context(gpu_kernels(self.meter))
            stack.enter_context(planned_loads(self._loads))
            self._watch_layers()
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.meter.pack, self.meter.unpack))
            stack.enter_context(self.meter)
            accumulate(model, batch, job.micro_batch, self._autocast, self.world)
            self._enter("clip")
            clip_gradients(model.parameters(), CLIP, self.world)
            self._enter("optimizer")
            for optimizer in optimizers:
                optimizer.step()
            self._enter("counts")
            share_counts(model, self.world)
            self.meter.watching = False
        return self.measured

    def _autocast(self) -> AbstractContextManager[Any]:
        """Where weights are not shared, nothing else casts them."""
        shared = isinstance(self.model, FSDPModule) or self.job.compute == "fp32"
        return nullcontext() if shared else torch.autocast("cpu", DTYPES[self.job.compute])

    def _loads(self, num_rows: int, ep: int) -> tuple[list[int], list[int]]:
        """Rows that go to every process in equal parts, and as many come, times the skew."""
        sent = _parts(num_rows, ep)
        return sent, _parts(round(num_rows * self.job.skew), ep)

    def _batch(self) -> tuple[Tensor, Tensor]:
        rows = self.job.micro_batch * min(3, self.job.num_micro_batches)
        tokens = torch.zeros(rows, self.job.seq_len, dtype=torch.int64)
        self.measured.base[ledger.OTHER] = self.meter.know([tokens], ledger.OTHER)
        return tokens, tokens

    def _prepare(self) -> list[torch.optim.Optimizer]:
        """Everything that is there before a step: weights, and the optimizer's states."""
        model, meter, measured = self.model, self.meter, self.measured
        if isinstance(model, FSDPModule):
            model._get_fsdp_state()._lazy_init()
        optimizers = build_optimizers(model, self.job.optimizer)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        states: dict[int, list[Tensor]] = {}
        for optimizer in optimizers:
            for weight, state in optimizer.state.items():
                states[id(weight)] = [part for part in state.values() if isinstance(part, Tensor)]

        def known(module: nn.Module) -> dict[str, int]:
            own = list(module.parameters())
            mine = [_local(part) for part in [*own, *module.buffers()]]
            held = [_local(part) for parameter in own for part in states.get(id(parameter), [])]
            return {
                ledger.WEIGHTS: meter.know(mine, ledger.WEIGHTS),
                ledger.OPTIMIZER: meter.know(held, ledger.OPTIMIZER),
            }

        measured.layers = [known(layer) for layer in model.layers]
        measured.mixtures = [sum(isinstance(part, MoE) for part in layer.modules()) for layer in model.layers]
        measured.base |= known(model)
        return optimizers

    def _watch_layers(self) -> None:
        model, meter = self.model, self.meter
        if isinstance(model.head, Head):
            label_logits(model.head, meter)
        for module in model.modules():
            if isinstance(module, Norm):
                module.register_forward_pre_hook(lambda _, args: meter.write(args[0]))
        for moe in model.moe_layers().values():
            moe.experts.backend = "grouped_mm"
            moe.experts.register_forward_pre_hook(lambda *_: setattr(meter, "saving", ledger.DISPATCH))
            moe.experts.register_forward_hook(lambda *_: setattr(meter, "saving", ledger.ACTIVATIONS))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulated)
        compute: Callable[..., Any] = model.loss

        def loss(*args: Any, **kwargs: Any) -> Any:
            self._enter(f"start.{self.micro_batch}")
            return compute(*args, **kwargs)

        model.loss = loss  # type: ignore[method-assign]
        model.embed.register_forward_hook(self._embedded)
        for index, layer in enumerate(model.layers):
            layer.register_forward_hook(self._layer_hook(index))

    def _accumulated(self, parameter: Tensor) -> None:
        """A gradient has arrived at a parameter that `fully_shard` does not look after."""
        if parameter.grad is not None:
            self.meter.keep(_local(parameter.grad), ledger.GRADIENTS)

    def _embedded(self, module: nn.Module, args: Any, result: Tensor) -> None:
        if self._name == f"start.{self.micro_batch}":
            self._boundary(result, f"forward.{self.micro_batch}.0", self._tail)

    def _tail(self) -> None:
        self._enter(f"tail.{self.micro_batch}")
        self.micro_batch += 1

    def _layer_hook(self, index: int) -> Callable[..., None]:
        last = index == len(self.model.layers) - 1

        def hook(module: nn.Module, args: Any, result: Tensor) -> None:
            if self.meter.phase != "forward":  # computed again
                return
            after = f"loss.{self.micro_batch}" if last else f"forward.{self.micro_batch}.{index + 1}"
            self._boundary(result, after, lambda: self._enter(f"backward.{self.micro_batch}.{index}"))

        return hook

    def _boundary(self, x: Tensor, after: str, on_return: Callable[[], None]) -> None:
        """The residual stream between two segments, forward; the gradient comes back to `on_return`."""
        meter = self.meter
        meter.write(x)

        def returned(grad: Tensor) -> None:
            meter.write(grad)
            on_return()

        if x.requires_grad:
            x.register_hook(returned)
        self._enter(after)

    def _enter(self, name: str) -> None:
        self._name, segment = name, Segment()
        self.measured.steps[name] = segment
        backward = name.startswith(("backward", "tail"))
        self.meter.saving = ledger.ACTIVATIONS
        self.meter.enter(segment, "backward" if backward else "forward")


def _parts(number: int, parts: int) -> list[int]:
    least, more = divmod(number, parts)
    return [least + (index < more) for index in range(parts)]


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _axis_names(world: World) -> dict[str, str]:
    """From the names of process groups to those of axes."""
    found: dict[str, str] = {}
    for mesh, suffix in ((world.dense, ""), (world.experts, "_experts"), (world.tokens, "")):
        for axis in mesh.mesh_dim_names or ():
            plain = axis if axis in ("tp", "ep", "etp", "pp", "cp", "dp") else axis + suffix
            found.setdefault(mesh[axis].get_group().group_name, plain)
    return found
