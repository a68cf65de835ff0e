"""The memory that training with zoo itself takes on one CPU device: the peak of a step and what makes it up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from zoo.plan.adapters import AdapterSize
from zoo.plan.base import Weight
from zoo.plan.own_step import Step
from zoo.plan.tape import ACTIVATIONS, GRADIENTS, KINDS, OPTIMIZER, WEIGHTS, Tape, Value
from zoo.plan.trunk import named_weights
from zoo.spec.block import BlockSpec
from zoo.spec.model import ModelSpec
from zoo.spec.moe import MoESpec
from zoo.spec.train import AdamWSpec, MuonSpec, OptimizerSpec

GIB = 2.0**30
ITEMSIZES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that a training step holds at a time."""

    parts: Mapping[str, float]
    """GiB by component at that moment; they sum to the total."""
    phase: str
    """The part of the step in which it is: `forward`, `backward`, `clip` or `optimizer`."""
    by_phase: Mapping[str, float]
    """GiB at the peak of each phase."""

    @property
    def total(self) -> float:
        """GiB."""
        return sum(self.parts.values())

    @property
    def nbytes(self) -> int:
        """The same in bytes."""
        return round(self.total * GIB)


def peak_memory(
    spec: ModelSpec,
    *,
    batch_size: int,
    seq_len: int,
    optimizer: OptimizerSpec,
    recompute: str = "none",
    weights: str = "fp32",
    compute: str = "fp32",
    grad_accumulation: int = 1,
    adapters: AdapterSize | None = None,
) -> PeakMemory:
    """The peak of a training step once the optimizer has its state, by the arithmetic of `zoo.plan.tape`.

    The bytes are those of tensors, as torch's allocator counts them, with the experts' backends of plain torch. What
    Python, torch itself and buffers inside of kernels take comes on top of them.

    Args:
        batch_size: sequences of a micro-batch.
        seq_len: tokens of a sequence.
        recompute: as `TrainSpec.recompute`: `none` or `layer`.
        weights: dtype of weights, gradients and optimizer state, `fp32` or `bf16`. With bf16, what state-space and
            delta-rule mixers widen to fp32 is not counted: up to 17% of the peak was missing.
        compute: dtype of matrix products. bf16 products with fp32 weights are counted as fp32 ones: 2 to 15% too much
            in the models that were measured.
        grad_accumulation: micro-batches of a step.
        adapters: what is trained in place of the weights; None: these.
    """
    del compute
    tape = Tape(batch_size, seq_len, ITEMSIZES[weights], frozen=adapters is not None)
    trained = [] if adapters is not None else list(_trained(spec))
    held = (
        tape.new(sum(weight.size for weight in named_weights(spec)), kind=WEIGHTS),
        tape.new(_buffer_bytes(spec), 1, kind=WEIGHTS),
        tape.new(_state_numbers(trained, optimizer), kind=OPTIMIZER),
        tape.new(2 * tape.num_tokens * grad_accumulation, 8, kind=ACTIVATIONS),
        *_of_adapters(tape, adapters or AdapterSize(0, 0.0), spec.num_layers if recompute == "layer" else 1),
    )
    for micro_batch in range(min(2, grad_accumulation)):  # a third one would be as the second
        tape.again = micro_batch > 0
        tape.enter("forward")
        loss = Step(spec, tape, recompute).loss()
        if recompute == "none":  # else the blocks share it a second time
            tape.forget()
        tape.enter("backward")
        tape.backward(loss)
        tape.forget()
    tape.enter("optimizer")
    _optimize(tape, trained, optimizer)
    del held
    return PeakMemory(
        {kind: tape.at_peak[kind] / GIB for kind in KINDS},
        tape.peak_phase,
        {phase: nbytes / GIB for phase, nbytes in tape.phase_peaks.items()},
    )


def _of_adapters(tape: Tape, adapters: AdapterSize, turns: int) -> tuple[Value, ...]:
    """Adapters in fp32, each with a gradient and two moments, and what tokens leave in them, a part in each turn."""
    kinds = {WEIGHTS: 1, GRADIENTS: 1, OPTIMIZER: 2}
    held = tuple(tape.new(times * adapters.numel, 4, kind=kind) for kind, times in kinds.items())
    return (*held, tape.new(adapters.kept * tape.num_tokens / turns, kind=ACTIVATIONS))


def _trained(spec: ModelSpec) -> Iterator[Weight]:
    """The weights that get gradients: a choice of keys has none, and correction biases are moved by counts."""
    for weight in named_weights(spec):
        names = weight.name.split(".")
        if "indexer" not in names and names[-1] != "correction_bias":
            yield weight


def _buffer_bytes(spec: ModelSpec) -> int:
    """Correction biases in fp32, and two counters of choices, that of the block and that of the trainer."""
    uses = [slot for kind in spec.layer_kinds for slot in _slots_of(spec, kind)]
    experts = [block.num_experts for block in uses if isinstance(block, MoESpec)]
    return sum((8 + 8 + 4) * count for count in experts) + 4 * spec.num_layers * spec.layer_scale


def _slots_of(spec: ModelSpec, kind: str) -> Iterator[BlockSpec]:
    layer = spec.kinds[kind]
    for slot in (layer.mixer, layer.ffn, layer.beside):
        if slot is not None:
            block = spec.slots[slot]
            yield getattr(block, "moe", block)


def _is_orthogonalized(weight: Weight) -> bool:
    """Whether Muon updates it: matrices inside layers, routers aside (`zoo.train.optim.role_of`)."""
    names = weight.name.split(".")
    return weight.product and names[0] != "head" and "router" not in names


def _state_numbers(trained: list[Weight], optimizer: OptimizerSpec) -> int:
    """AdamW keeps two moments and a counter of steps, Muon a momentum."""
    numbers = 0
    for weight in trained:
        mine = isinstance(optimizer, MuonSpec) and _is_orthogonalized(weight)
        numbers += weight.size if mine else 2 * weight.size + 1
    return numbers


def _optimize(tape: Tape, trained: list[Weight], optimizer: OptimizerSpec) -> None:
    """The updates. AdamW's is one fused operation, which needs nothing beside its state."""
    if isinstance(optimizer, AdamWSpec):
        return
    shapes = {weight.shape: weight for weight in trained if _is_orthogonalized(weight)}
    for weight in shapes.values():
        _orthogonalize(tape, weight)


def _orthogonalize(tape: Tape, weight: Weight) -> None:
    """`zoo.train.muon`: the momentum's direction, and the iteration on it in fp32."""
    rows, columns = weight.shape[-2:]
    matrices = weight.size // (rows * columns)
    if weight.name.endswith("gate_up"):
        rows, matrices = rows // 2, matrices * 2
    square = matrices * min(rows, columns) ** 2
    direction = tape.new(weight.size)
    x = tape.new(weight.size, 4)
    gram = tape.new(square, 4)
    scaled_x = tape.new(weight.size, 4)
    scaled_gram, gram_twice = tape.new(square, 4), tape.new(2 * square, 4)
    del gram_twice
    polynomial = tape.new(square, 4)
    del scaled_gram
    product = tape.new(weight.size, 4)
    del polynomial
    result = tape.new(weight.size, 4)
    del direction, x, gram, scaled_x, product, result
