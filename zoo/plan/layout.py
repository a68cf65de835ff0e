"""How a training run is spread over devices: one layout, and many of them as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.spec.base import ConfigError, near

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Their product tp * cp * pp * dp is the number of devices.

    Raises:
        ConfigError: a degree is no positive integer.
    """

    tp: int = 1
    """Devices that share the matrices of a layer (tensor parallelism with sequence parallelism, arXiv:2205.05198)."""
    pp: int = 1
    """Pipeline stages."""
    vp: int = 1
    """Pieces of the model on each stage (interleaved schedule, arXiv:2104.04473)."""
    cp: int = 1
    """Devices that share the tokens of a sequence."""
    ep: int = 1
    """Groups of devices that share the experts of a layer."""
    etp: int = 1
    """Devices that share the matrices of an expert."""
    dp: int = 1
    """Replicas that work on different sequences."""
    shard: int = 1
    """Of the dp * cp devices with the same part of the model, how many share its weights (fully sharded); 1: each has
    them whole, and only the optimizer's states are shared."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"layout.{name}: found {value!r}; must be a positive integer")

    @property
    def num_devices(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def __str__(self) -> str:
        named = [f"{name}{value}" for name, value in asdict(self).items() if value > 1]
        return " ".join(named) or "one device"


RECOMPUTED = ("full", "core", "act", "mlp", "moe", "up", "every_other")
"""What is computed again in the backward pass instead of kept: whole layers; attention's core; activation functions and
norms; dense MLPs; mixtures of experts; the projections out of latents; every other matrix product."""
OFFLOADED = "offload"
"""Activations that are kept, but in the memory of the host (Megatron-Core's `cpu_offloading_num_layers`)."""

_RECOMPUTE_NAMES: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": ("full",),
    "selective": ("core",),
    "selective_op": ("every_other", "core"),
    "core_attn": ("core",),
    "mla_up_proj": ("up",),
    "up_proj": ("up",),
    "moe_act": ("act",),
    "act": ("act",),
    "layernorm": ("act",),
    "norm": ("act",),
    "mlp": ("mlp",),
    "shared_experts": (),
    "moe": ("moe",),
}


def recompute_parts(recompute: str) -> dict[str, float]:
    """What a setting stands for: 1 by part of RECOMPUTED, and by OFFLOADED the layers of a stage that it goes for.

    A setting is a name, `selective:NAME,NAME`, `offload` (activations of all layers go to the host's memory and back),
    `offload:20` (of 20 layers of each stage), or several of these joined by `+`: `full+offload` keeps nothing of a
    layer but its input, and that on the host.

    Raises:
        ConfigError: no such name, or no such number of layers.
    """
    found: dict[str, float] = {}
    for term in recompute.split("+"):
        name, _, count = term.partition(":")
        if name == OFFLOADED:
            found[OFFLOADED] = _layers_of(term, count)
            continue
        names = term.split(":", 1)[1].split(",") if term.startswith("selective:") else [term]
        unknown = [name for name in names if name not in _RECOMPUTE_NAMES]
        if unknown:
            hint = near(unknown[0], [*_RECOMPUTE_NAMES, OFFLOADED]) or f"allowed: {', '.join(_RECOMPUTE_NAMES)}"
            forms = "; also selective:NAME,NAME, offload, offload:LAYERS, or these joined by +"
            raise ConfigError(f"recompute: found {unknown[0]!r}; {hint}{forms}")
        found |= {part: 1.0 for name in names for part in _RECOMPUTE_NAMES[name]}
    return found


def _layers_of(term: str, count: str) -> float:
    if term == OFFLOADED:
        return math.inf
    if not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"recompute: found {term!r}; after offload: comes a number of layers, such as offload:20")
    return float(count)


@dataclass(frozen=True)
class Points:
    """Layouts with what is run on them, as arrays [n] of one length; everything downstream is element by element."""

    tp: Array
    pp: Array
    vp: Array
    cp: Array
    ep: Array
    etp: Array
    dp: Array
    shard: Array
    micro_batch: Array
    """Sequences of a micro-batch."""
    seq_len: Array
    global_batch: Array
    """Sequences of a step, on all devices."""
    recompute: Mapping[str, Array] = field(default_factory=dict)
    """0 or 1 by part of RECOMPUTED; absent parts are kept. By OFFLOADED: layers of a stage."""

    @classmethod
    def of(
        cls,
        layouts: Sequence[Layout],
        *,
        seq_len: int | Sequence[int],
        global_batch: int | Sequence[int],
        micro_batch: int | Sequence[int] = 1,
        recompute: str | Sequence[str] = "none",
    ) -> Points:
        """Arrays of layouts; every other argument is one for all or one for each."""
        n = len(layouts)

        def column(values: Any) -> Array:
            return np.broadcast_to(np.asarray(values, dtype=np.float64), (n,)).copy()

        degrees = {f.name: column([getattr(layout, f.name) for layout in layouts]) for f in fields(Layout)}
        each = [recompute] * n if isinstance(recompute, str) else list(recompute)
        parts = [recompute_parts(name) for name in each]
        again = {part: column([some.get(part, 0.0) for some in parts]) for part in (*RECOMPUTED, OFFLOADED)}
        return cls(
            **degrees,
            micro_batch=column(micro_batch),
            seq_len=column(seq_len),
            global_batch=column(global_batch),
            recompute=again,
        )

    def __len__(self) -> int:
        return len(self.tp)

    def again(self, part: str) -> Array:
        """1 where a part is computed again, 0 elsewhere; of OFFLOADED as many layers as are given."""
        return self.recompute.get(part, np.zeros(len(self)))

    @property
    def num_devices(self) -> Array:
        return self.tp * self.cp * self.pp * self.dp

    def offloaded(self, num_layers: int) -> Array:
        """The part of a stage's layers whose activations are on the host."""
        mine = num_layers / self.pp
        return np.asarray(np.minimum(self.again(OFFLOADED), mine) / mine)

    @property
    def tokens(self) -> Array:
        """Tokens of a micro-batch on one device, before sequence parallelism divides them by tp."""
        return self.micro_batch * self.seq_len / self.cp

    @property
    def num_micro_batches(self) -> Array:
        """Micro-batches of a step on each device."""
        return self.global_batch / (self.micro_batch * self.dp)

    @property
    def expert_dp(self) -> Array:
        """Devices that hold the same experts."""
        return self.dp * self.cp * self.tp / (self.ep * self.etp)

    @property
    def expert_shard(self) -> Array:
        """How many of these share their weights: those of a group that shares all weights. Where no two of such a group
        hold the same experts, all that do share them, as `zoo.parallel.mesh` and NeMo AutoModel have it."""
        mates, everyone = self.shard * self.tp / (self.ep * self.etp), np.maximum(self.expert_dp, 1.0)
        return np.where((self.shard > 1) & (mates <= 1), everyone, np.clip(mates, 1.0, everyone))
