"""A dispatch mode that watches a step: every storage, matrix product and collective, on tensors without values.

With `fused`, memory is counted as fusing kernels use it: what is computed entry by entry between two matrix products,
scans or collectives is one kernel, which writes only what the next of these reads, and is computed again in the
backward pass from what went into it. Without, every result of every operation of torch takes memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.dryrun import ledger
from zoo.dryrun.collectives import travel_of
from zoo.dryrun.flops import flops_of, is_fusable, reads
from zoo.dryrun.held import Held, tensors_in
from zoo.dryrun.ledger import Segment

MUCH_SMALLER = 8
"""A result that is so many times smaller than what it is made of is written, not computed again."""


class Meter(TorchDispatchMode):
    """Counts what happens within, segment by segment.

    Args:
        fused: see above.
        discard: do not keep what fused kernels write, but what they read: activations and norms are computed again.
        axis_of: from the name of a process group to that of an axis.
    """

    def __init__(self, fused: bool, discard: bool, axis_of: Callable[[str], str]) -> None:
        super().__init__()
        self.fused, self.discard, self.axis_of = fused, discard, axis_of
        self.segment = Segment()
        self.labels = [ledger.OTHER]
        """What storages are taken for; the last one counts."""
        self.saving = ledger.ACTIVATIONS
        """What is kept for the backward pass is kept for this."""
        self.phase = "forward"
        self.watching = True
        self._inside: tuple[Held, ...] | None = None
        self._held: dict[int, Held] = {}
        self._refs: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1  # no value is known: a count, a norm, a loss
        result = func(*args, **kwargs)
        if not self.watching:
            return result
        self._count(func, args, kwargs, result)
        if func.is_view or func.namespace == "prim":  # no work: another shape, or what is known of a tensor
            return result
        fresh = [(part, store) for part in tensors_in(result) if (store := self._unknown(part)) is not None]
        heavy = self._inside is None and not (self.fused and is_fusable(func))
        if self.fused and (heavy or fresh):
            self._flow(func, [self._known(part) for part in tensors_in((args, kwargs))], fresh, heavy)
        else:
            for part, store in fresh:
                self._take(part, store)
        return result

    def enter(self, segment: Segment, phase: str) -> None:
        """What happens from now on belongs to `segment`."""
        self.segment, self.phase = segment, phase

    @contextmanager
    def label(self, kind: str) -> Iterator[None]:
        """Storages that are taken within are for `kind`, and written."""
        self.labels.append(kind)
        try:
            yield
        finally:
            self.labels.pop()

    @contextmanager
    def kernel(self, inputs: Iterable[Any]) -> Iterator[Segment]:
        """One kernel: what is taken within takes no memory of its own; nor do its FLOPs count, but are handed out."""
        own, segment = Segment(), self.segment
        before = self._inside
        if self.fused:
            self._inside = self._sources([self._known(part) for part in tensors_in(tuple(inputs))])
        self.segment = _Aside(segment, own)
        try:
            yield own
        finally:
            self.segment, self._inside = segment, before

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """What happens within is not part of the step."""
        before, self.watching = self.watching, False
        try:
            yield
        finally:
            self.watching = before

    def know(self, tensors: Iterable[Tensor], kind: str) -> int:
        """Take note of storages that are there before; their bytes, which count for no segment."""
        total = 0
        for tensor in tensors:
            store = tensor.untyped_storage()
            if store._cdata not in self._held:
                total += store.nbytes()
                self._note(store, Held(store.nbytes(), kind))
        return total

    def written(self, *tensors: Tensor) -> None:
        """A kernel reads these: what is fused is written first."""
        for tensor in tensors:
            if (held := self._known(tensor)) is not None:
                self._read(held)

    def write(self, tensor: Tensor) -> None:
        """Of a fused result: it is written, and kept where it is needed."""
        if (held := self._known(tensor)) is not None:
            self._promote(held)
            held.fused = False

    def keep(self, tensor: Tensor, kind: str) -> None:
        """A result is written, and kept for `kind`."""
        self.write(tensor)
        if (held := self._known(tensor)) is not None:
            self._relabel(held, kind)

    def _relabel(self, held: Held, kind: str) -> None:
        """A storage is for another kind from now on."""
        if self._weighs(held):
            self.segment.change(held.kind, -held.nbytes)
            self.segment.change(kind, held.nbytes)
        held.kind = kind

    def pack(self, tensor: Tensor) -> Any:
        """A hook for what autograd keeps."""
        if isinstance(tensor, DTensor) or not self.watching or (held := self._known(tensor)) is None:
            return tensor
        for kept in (held, *(() if held.counted else held.sources)):
            if kept.kind == ledger.OTHER:
                self._relabel(kept, self.saving)
        cast_weight = all(source.kind == ledger.WEIGHTS for source in held.sources)
        if held.fused and held.sources and (cast_weight or (self.discard and not held.costly)):
            return _Again(self, tensor, held)
        return tensor

    def unpack(self, packed: Any) -> Tensor:
        """The hook that goes with `pack`."""
        return packed.tensor() if isinstance(packed, _Again) else packed

    def resized(self, store: torch.UntypedStorage, nbytes: int) -> None:
        """A storage is about to have another size."""
        held = self._held.get(store._cdata)
        if held is None:
            self._note(store, Held(0, self.labels[-1]))
            held = self._held[store._cdata]
        if self.watching:
            self.segment.change(held.kind, nbytes - held.nbytes)
        held.nbytes = nbytes

    def _known(self, tensor: Tensor) -> Held | None:
        return self._held.get(tensor.untyped_storage()._cdata)

    def _unknown(self, tensor: Tensor) -> torch.UntypedStorage | None:
        store = tensor.untyped_storage()
        return None if store._cdata in self._held else store

    def _note(self, store: torch.UntypedStorage, held: Held) -> None:
        key = store._cdata
        self._held[key] = held
        self._refs[key] = weakref.ref(store, lambda _: self._gone(key))

    def _take(self, part: Tensor, store: torch.UntypedStorage) -> Held:
        held = Held(store.nbytes(), self.labels[-1])
        if store._cdata not in self._held:
            self._note(store, held)
            self.segment.change(held.kind, held.nbytes)
        return held

    def _flow(
        self, func: Any, inputs: list[Held | None], fresh: list[tuple[Tensor, torch.UntypedStorage]], heavy: bool
    ) -> None:
        """What an operation reads has to be written if it is no part of a fused kernel, and so is what it gives."""
        if heavy:
            for held in inputs if reads(func) else ():
                if held is not None:
                    self._read(held)
            for part, store in fresh:
                self._take(part, store)
            return
        sources = self._sources(inputs) if self._inside is None else self._inside
        widest = max((held.nbytes for held in inputs if held is not None), default=0)
        narrow = inputs[0] if func is torch.ops.aten._to_copy.default else None
        costly = self._inside is not None or any(
            held is not None and held.costly and not held.counted for held in inputs
        )
        for part, store in fresh:
            small = self._inside is None and store.nbytes() * MUCH_SMALLER <= widest
            written = self.labels[-1] != ledger.OTHER or not part.dtype.is_floating_point or small
            if written and self._inside is None:
                self._take(part, store)
            if store._cdata in self._held:
                continue
            held = Held(store.nbytes(), ledger.OTHER, False, sources=sources, costly=costly, fused=True)
            if narrow is not None and narrow.nbytes < held.nbytes:
                held.narrow = narrow
            self._note(store, held)
            self._hold(held)

    def _sources(self, inputs: list[Held | None]) -> tuple[Held, ...]:
        found: dict[int, Held] = {}
        for held in inputs:
            if held is not None:
                for source in (held,) if held.counted else held.sources:
                    found[id(source)] = source
        return tuple(found.values())

    def _hold(self, held: Held) -> None:
        held.holding = True
        for source in held.sources:
            source.holds += 1

    def _release(self, held: Held) -> None:
        if held.holding:
            held.holding = False
            self.release(held.sources)

    def release(self, sources: Iterable[Held]) -> None:
        """Something that is computed again from `sources` is gone."""
        for source in sources:
            source.holds -= 1
            if not source.holds and not source.alive and source.counted and self.watching:
                self.segment.change(source.kind, -source.nbytes)

    def _read(self, held: Held) -> None:
        """A kernel reads it from memory, or what it is a wider copy of."""
        if held.counted or held.narrow is None:
            self._promote(held)
            return
        self._read(held.narrow)
        if held.sources != (held.narrow,):
            self._release(held)
            held.sources = (held.narrow,)
            self._hold(held)

    def _promote(self, held: Held) -> None:
        if held.counted:
            return
        held.counted = True
        if self.watching:
            self.segment.change(held.kind, held.nbytes)
        self._release(held)

    def _weighs(self, held: Held) -> bool:
        return held.counted and (held.alive or held.holds > 0)

    def _gone(self, key: int) -> None:
        held = self._held.pop(key)
        self._refs.pop(key)
        held.alive = False
        if held.counted and not held.holds and self.watching:
            self.segment.change(held.kind, -held.nbytes)
        self._release(held)

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if flops := flops_of(func, args, kwargs, result):
            self.segment.flops[self.phase] += flops
        found = travel_of(func, args, self.axis_of)
        if found is not None and found[0].size > 1:
            self.segment.calls[found[0]] += 1
            self.segment.sent[found[0]] += found[1]


class _Aside(Segment):
    """Memory goes to one segment, FLOPs to another."""

    def __init__(self, memory: Segment, rest: Segment) -> None:
        super().__init__(flops=rest.flops, calls=memory.calls, sent=memory.sent)
        self._memory = memory

    def change(self, kind: str, nbytes: int) -> None:
        self._memory.change(kind, nbytes)


class _Again:
    """What autograd keeps of a tensor that is computed again when it is needed."""

    def __init__(self, meter: Meter, tensor: Tensor, held: Held) -> None:
        self._meter, self._sources = meter, held.sources
        self._shape = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        for source in held.sources:
            source.holds += 1

    def tensor(self) -> Tensor:
        """A tensor of the same shape, as a fused kernel gives it."""
        shape, stride, dtype, device = self._shape
        meter = self._meter
        before, meter._inside = meter._inside, self._sources
        try:
            result = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        finally:
            meter._inside = before
        held = meter._known(result)
        if held is not None:
            held.costly = False
        return result

    def __del__(self) -> None:
        self._meter.release(self._sources)
