"""What a machine is, in facts with their sources, and two choices that it brings a default for: precision and kernels.

Units are in the names: `_gib` is 2**30 bytes, `_gb_s` 10**9 bytes per second, `_gbit_s` 10**9 bits per second,
`tflops` 10**12 floating-point operations per second, a multiply-add counting 2. A fact that is not known is absent.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator

from zoo.spec.base import Items, Spec, near, problem

Device = Literal["cpu", "cuda", "mps", "xpu", "hpu", "xla"]
"""What torch calls the devices of a kind of chip; `cuda` stands for AMD's as well."""

Mark = Literal["recalled", "derived", "measured"]
"""`recalled`: from memory of a datasheet that was not read again. `derived`: arithmetic on other facts. `measured`: on
the machine itself, by `zoo.hardware`."""


class SourcedSpec(Spec):
    """Facts, where they come from, and which of them are weaker than read there."""

    marks: dict[str, Mark] = Field(default_factory=dict)
    """By the path of the fact below this description: `{tflops.fp8: derived}`."""
    sources: Items[str] = ()

    @model_validator(mode="after")
    def _check_marks(self) -> SourcedSpec:
        known = _leaves(self)
        for path in self.marks:
            if path not in known:
                raise problem("marks", path, "must be the path of a fact", near(path, known))
        return self


class PeakSpec(Spec):
    """Dense matrix-multiply peaks, in TFLOP/s (int8: TOP/s), by the dtype of the factors; sums are fp32 or int32.

    Absent: the chip has no faster path for the dtype, or the number is not known.
    """

    fp32: PositiveFloat | None = None
    tf32: PositiveFloat | None = None
    bf16: PositiveFloat | None = None
    fp8: PositiveFloat | None = None
    fp6: PositiveFloat | None = None
    fp4: PositiveFloat | None = None
    int8: PositiveFloat | None = None


class LinkSpec(Spec):
    """A way for data into and out of a chip."""

    name: str | None = None
    gb_s: PositiveFloat | None = None
    """One way, per chip, all of its ports together."""
    pair_gb_s: PositiveFloat | None = None
    """One way, between two chips, where that is less than `gb_s` (a mesh or a torus); absent: no less."""


class ChipSpec(SourcedSpec):
    """One accelerator or one processor with all its cores: what counts as a device."""

    name: str
    vendor: str | None = None
    generation: str | None = None
    device: Device | None = None
    """Absent: whatever the machine has when it runs."""
    reported_as: Items[str] = ()
    """The names that drivers give to this chip, by which `hardware=auto` recognises it."""
    tflops: PeakSpec = Field(default_factory=PeakSpec)
    memory_gib: PositiveFloat | None = None
    """What a program can use where a source says so, else the size on the label: memory chips come in powers of two."""
    memory_type: str | None = None
    memory_gb_s: PositiveFloat | None = None
    scale_up: LinkSpec = Field(default_factory=LinkSpec)
    """To the other chips of the fast domain."""
    host: LinkSpec = Field(default_factory=LinkSpec)
    """To the memory of the host; a link that chips share is divided among them."""
    power_w: PositiveFloat | None = None
    """Thermal design power."""
    num_cores: PositiveInt | None = None
    """Streaming multiprocessors, compute units, or cores of a processor."""
    announced: bool = False
    """No fact of this chip has been measured: its makers have only announced it."""


class StorageSpec(Spec):
    """The file system that holds data and checkpoints: what all devices together get from it."""

    read_gb_s: PositiveFloat | None = None
    write_gb_s: PositiveFloat | None = None


class HardwareSpec(SourcedSpec):
    """A machine: devices of one kind, in domains of fast links, that a network joins."""

    name: str
    detect: bool = False
    """Fill in what is absent when the machine runs (`zoo.hardware`)."""
    chip: ChipSpec
    num_devices: PositiveInt = 1
    """In all."""
    domain_size: PositiveInt = 1
    """Devices that share the chip's `scale_up` links; more devices than this are several domains."""
    scale_out_gbit_s: PositiveFloat | None = None
    """The network between domains: one way, per device."""
    storage: StorageSpec = Field(default_factory=StorageSpec)

    @property
    def num_domains(self) -> int:
        return math.ceil(self.num_devices / self.domain_size)


class PrecisionSpec(Spec):
    """The dtypes of a training run. Router arithmetic, norms' statistics and losses are fp32 in any case."""

    compute: Literal["auto", "fp32", "bf16"] = "auto"
    """Of matrix multiplications and of the activations between them. `auto`: bf16 where that is clearly faster."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Of the weights that the optimizer updates, and so of gradients and optimizer states."""

    @model_validator(mode="after")
    def _check(self) -> PrecisionSpec:
        if self.weights == "bf16" and self.compute == "fp32":
            raise problem("weights", self.weights, "must be fp32 when compute is fp32")
        return self


class KernelsSpec(Spec):
    """Which implementation computes a block; all of them agree (DESIGN.md, section 5)."""

    experts: Literal["auto", "loop", "grouped", "grouped_mm", "compiled"] = "auto"
    """`loop`: one expert after the other, the reference. `grouped`: sorted by expert, in one autograd function.
    `grouped_mm`: torch's own grouped matrix multiplication. `compiled`: a kernel for gated silu experts in fp32 on a
    CPU, made by a C++ compiler when it is first needed. `auto`: the fastest that runs on the device."""
    decode: Literal["auto", "eager", "compiled"] = "auto"
    """Writing text, one token at a time. `eager`: block by block. `compiled`: by kernels that a C++ compiler makes for
    this processor when they are first needed. `auto`: compiled where that is possible and worth it."""
    tune: bool = True
    """On a CPU, set up the process for speed before training (`zoo.tuning`): allocator, threads, the library of fp32
    products, the kernels of experts. What was chosen is probed once, and said when the run starts."""


def _leaves(spec: BaseModel, path: str = "") -> list[str]:
    """The dotted paths of all fields below `spec` that hold no further fields."""
    paths = []
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        paths += _leaves(value, f"{path}{name}.") if isinstance(value, BaseModel) else [path + name]
    return paths
