"""Running a trained model: what it takes in memory, and how fast it can be at best.

Speeds are limits: the longer of arithmetic at the chip's peak and of memory at its full bandwidth, with weights and
cache spread evenly over the devices and nothing lost on the links between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from zoo.plan.engine import PRECISIONS
from zoo.plan.machines import machines
from zoo.plan.memory import GIB
from zoo.plan.params import named_weights
from zoo.plan.price import CONTEXT_GIB
from zoo.plan.question import composed, default_seq_len, precision_of, with_measured
from zoo.plan.trunk import EMBED, slot_costs
from zoo.spec.base import ConfigError, near
from zoo.spec.hardware import HardwareSpec
from zoo.spec.model import ModelSpec

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "mxfp8": 1 + 1 / 32, "nvfp4": 0.5625}
"""Of a weight of a matrix product, with its scales: one byte for 32 numbers in mxfp8, one for 16 in nvfp4."""
WIDE_BYTES = 2.0
"""Of norms, embeddings and routers in narrow precisions."""
STATE_BYTES = 4.0
"""Of an element of a recurrent state: fp32 in any case."""


@dataclass(frozen=True)
class Inference:
    """What it takes to run a model with a batch of sequences of a length."""

    model: str
    hardware: str
    num_devices: int
    context: int
    """Tokens of a sequence, all of them in the cache."""
    batch: int
    precision: str
    weights_gib: float
    cache_gib: Mapping[str, float]
    """By slot and by what is kept: `attention.keys`, `mla.latents`, `mamba.state`."""
    workspace_gib: float
    """Logits and activations of one prefill chunk, and what drivers take, on all devices."""
    memory_limit_gib: float | None
    """Of all devices."""
    prefill_s: float
    """To read all prompts of the batch, at best."""
    decode_s: float
    """To add one token to every sequence, at best."""
    bound: str
    """What limits decoding: `memory` or `arithmetic`."""
    smallest: tuple[str, ...]
    """Machines on which all of it fits, the fewest devices and the least memory first."""

    @property
    def total_gib(self) -> float:
        return self.weights_gib + sum(self.cache_gib.values()) + self.workspace_gib

    @property
    def fits(self) -> bool:
        return self.memory_limit_gib is None or self.total_gib <= self.memory_limit_gib

    @property
    def decode_tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.batch / self.decode_s

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.batch * self.context / self.prefill_s


def inference(
    model: str | ModelSpec,
    hardware: str | HardwareSpec,
    *overrides: str,
    context: int | None = None,
    batch: int = 1,
    precision: str | None = None,
    cache_precision: str = "bf16",
) -> Inference:
    """What running a model takes, and its speed limits.

    Args:
        model: A name or a description.
        hardware: A name or a description; all of its devices work together.
        overrides: Changes, as on the command line.
        context: Tokens of a sequence; absent: 4096, or the model's context where that is shorter.
        batch: Sequences at a time.
        precision: Of weights and products; absent: the one of the machine's profile.
        cache_precision: Of keys, values and latents.

    Raises:
        ConfigError: something is unknown or no number of its kind.
    """
    spec, machine, profile = composed(model, hardware, overrides)
    machine = with_measured(machine)
    precision = precision or precision_of(machine, profile)
    length = default_seq_len(spec) if context is None else context
    _check(precision, cache_precision, length, batch)
    weights, cache = weight_bytes(spec, precision) / GIB, cache_bytes(spec, length, cache_precision)
    kept = {name: batch * value / GIB for name, value in cache.items()}
    workspace = CONTEXT_GIB * machine.num_devices + _buffers(spec, batch) / GIB
    read = batch * sum(cache_bytes(spec, length, cache_precision, only_read=True).values())
    prefill, decode, bound = _speed(spec, machine, precision, length, batch, read)
    total = weights + sum(kept.values()) + _buffers(spec, batch) / GIB
    limit = machine.chip.memory_gib
    return Inference(
        model=spec.name,
        hardware=machine.name,
        num_devices=machine.num_devices,
        context=length,
        batch=batch,
        precision=precision,
        weights_gib=weights,
        cache_gib=kept,
        workspace_gib=workspace,
        memory_limit_gib=None if limit is None else limit * machine.num_devices,
        prefill_s=prefill,
        decode_s=decode,
        bound=bound,
        smallest=smallest_machines(total),
    )


def _check(precision: str, cache_precision: str, context: int, batch: int) -> None:
    for name, value in (("precision", precision), ("cache_precision", cache_precision)):
        if value not in WEIGHT_BYTES:
            hint = near(value, WEIGHT_BYTES) or f"allowed: {', '.join(WEIGHT_BYTES)}"
            raise ConfigError(f"{name}: found {value!r}; {hint}")
    for name, size in (("context", context), ("batch", batch)):
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name}: found {size!r}; must be a positive integer")


def weight_bytes(spec: ModelSpec, precision: str) -> float:
    """Bytes of all weights; in narrow precisions embeddings, norms, routers and biases stay wide."""
    each, wide = WEIGHT_BYTES[precision], max(WEIGHT_BYTES[precision], WIDE_BYTES)
    total = 0.0
    for weight in named_weights(spec):
        narrow = weight.product and weight.part != EMBED and "router" not in weight.name and len(weight.shape) > 1
        total += weight.size * (each if narrow else wide)
    return total


def cache_bytes(spec: ModelSpec, num_tokens: int, precision: str = "bf16", only_read: bool = False) -> dict[str, float]:
    """Bytes that one sequence of `num_tokens` leaves in the cache, by slot and by what is kept.

    Args:
        only_read: What the next token reads of it: an indexer chooses among keys.
    """
    costs = slot_costs(spec)
    mixers = Counter(kind.mixer for kind in (spec.kinds[name] for name in spec.layer_kinds) if kind.mixer)
    found: dict[str, float] = {}
    for slot, times in mixers.items():
        indexer = getattr(spec.slots[slot], "indexer", None) if only_read else None
        chosen = num_tokens if indexer is None else indexer.top_k * getattr(indexer, "block_size", 1)
        whole, some = costs[slot].cache(num_tokens), costs[slot].cache(min(num_tokens, chosen))
        for part in whole:
            elements = whole[part] if part == "indexer" else some[part]
            each = STATE_BYTES if part == "state" else WEIGHT_BYTES[precision]
            found[f"{slot}.{part}"] = times * elements * each
    return found


def read_bytes(spec: ModelSpec, precision: str, batch: int) -> float:
    """Bytes of the weights that one token of each of `batch` sequences touches, experts by chance alike."""
    each, wide = WEIGHT_BYTES[precision], max(WEIGHT_BYTES[precision], WIDE_BYTES)
    total = 0.0
    for weight in named_weights(spec):
        if weight.part == EMBED:
            total += weight.size * wide if spec.head.tied else batch * spec.d_model * wide
            continue
        share = float(weight.share)
        touched = weight.size * (1 - (1 - share) ** batch)
        total += touched * (each if weight.product and len(weight.shape) > 1 else wide)
    return total


def _speed(
    spec: ModelSpec, machine: HardwareSpec, precision: str, length: int, batch: int, cache: float
) -> tuple[float, float, str]:
    """Seconds of a prefill and of a decoding step at best, and what limits the latter."""
    peak, byte_s = _rates(machine, precision)
    flops = spec.flops(length)
    logits = flops.by_block["head"]
    # Of a prompt only the last token's logits are wanted.
    prompts = batch * (length * (flops.total - logits) + logits)
    prefill = max(prompts / peak, weight_bytes(spec, precision) / byte_s)
    # The newest token meets all keys: twice as many as the mean token of a prompt, in full attention.
    scores = sum(value for name, value in flops.by_block.items() if name.endswith(".scores"))
    arithmetic = batch * (flops.total + scores) / peak
    memory = (read_bytes(spec, precision, batch) + cache) / byte_s
    return prefill, max(arithmetic, memory), "memory" if memory >= arithmetic else "arithmetic"


def _rates(machine: HardwareSpec, precision: str) -> tuple[float, float]:
    """FLOP/s and bytes/s of all devices; a chip without a faster path computes in the next wider dtype that it has."""
    peaks, dtype = machine.chip.tflops, PRECISIONS[precision][0]
    order = ("fp4", "fp8", "bf16", "fp32")
    wider = order[order.index(dtype) :] if dtype in order else (dtype, "bf16", "fp32")
    peak = next((getattr(peaks, name) for name in wider if getattr(peaks, name)), None)
    if peak is None or machine.chip.memory_gb_s is None:
        path = "tflops.bf16" if peak is None else "memory_gb_s"
        raise ConfigError(f"hardware.chip.{path}: is not known for {machine.chip.name}; give it")
    return machine.num_devices * peak * 1e12, machine.num_devices * machine.chip.memory_gb_s * 1e9


def _buffers(spec: ModelSpec, batch: int) -> float:
    """Bytes of the logits of the newest tokens, in fp32."""
    return 4.0 * batch * spec.vocab_size


def smallest_machines(total_gib: float, most: int = 3) -> tuple[str, ...]:
    """Machines, in parts where they have several devices, that hold so much beside what drivers take."""
    options: list[tuple[int, float, str]] = []
    for machine in machines():
        each = (machine.chip.memory_gib or 0.0) - CONTEXT_GIB
        count = max(1, -int(-total_gib // each)) if each > 0 else 0
        power = 1 << (count - 1).bit_length() if count else 0
        if not count or machine.chip.announced:
            continue
        if power > machine.domain_size and power > machine.num_devices:
            continue
        gib = machine.chip.memory_gib or 0.0
        options.append((power, power * gib, f"{power} x {machine.chip.name} ({machine.name}, {power * gib:g} GiB)"))
    options.sort()
    return tuple(name for _, _, name in options[:most])
