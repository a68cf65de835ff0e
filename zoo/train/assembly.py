"""From the settings of a run to everything that its loop works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from zoo.adapt.origin import initial_model
from zoo.data.batches import heldout_rows
from zoo.data.corpus import Corpus, load_corpus
from zoo.data.ngram import TrigramBaseline
from zoo.data.tokenizer import Tokenizer
from zoo.decoder import Decoder, build
from zoo.hardware import Speed, local_hardware, measure
from zoo.hardware.local import available_gib, num_cpus
from zoo.hardware.speed import cache_dir
from zoo.spec.base import ConfigError
from zoo.spec.data import BytesTokenizer, FileTokenizer
from zoo.spec.finetune import LoraFinetune
from zoo.spec.hardware import ChipSpec, PrecisionSpec
from zoo.spec.run import RunSpec
from zoo.train.checks import check_inputs
from zoo.train.crew import Alone, Crew
from zoo.train.ema import Ema
from zoo.train.events import Predicted
from zoo.train.layouts import place_many
from zoo.train.optim import build_optimizers
from zoo.train.peak import PeakMeter
from zoo.train.placement import Placement, place
from zoo.train.prediction import predictor
from zoo.train.torchrun import check_processes, launched
from zoo.train.trainer import Autocast
from zoo.tuning import tuned

FLOPS_FACTOR = 3
"""Forward and backward over forward: the backward pass multiplies twice for every product of the forward pass."""
FLOPS_FACTOR_FROZEN = 2
"""The same where adapters are trained: the gradients of the weights are not needed."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLEARLY_FASTER = 1.5
"""bf16 costs accuracy: it has to multiply at least this many times as fast as fp32 to be chosen unasked."""
_LEAST_TOKENS = 64
"""For the counts of the baseline."""


@dataclass(frozen=True)
class Assembly:
    """What a run is made of."""

    model: Decoder
    optimizers: list[torch.optim.Optimizer]
    corpus: Corpus
    autocast: Autocast
    """What the forward pass is wrapped in."""
    compute: str
    """The dtype of matrix multiplications, as `PrecisionSpec.compute` names it, `auto` decided."""
    device: torch.device
    forward_flops_per_token: float
    flops_factor: int
    """What a step multiplies over what its forward pass does."""
    peak_flops_per_s: float | None
    """Of matrix multiplications in `compute`, measured on this machine; None when it has none of these."""
    hardware: str
    """One line for people."""
    choices: tuple[str, ...]
    """One line for each decision taken here, with its reason."""
    placement: Placement
    """Micro-batch and recomputing, chosen or as the settings say, with what they are predicted to take."""
    peak: PeakMeter
    """Watches memory since before there was a model."""
    baselines: dict[str, float]
    """Bits per byte of simple models on the text that evaluations read."""
    sample: Callable[[str], str]
    """Write on from a prompt, as the settings say."""

    def mfu(self, tokens_per_s: float) -> float | None:
        """Model FLOP/s over what the machine reaches in matrix products; None when that is not known."""
        if not self.peak_flops_per_s:
            return None
        return self.flops_factor * self.forward_flops_per_token * tokens_per_s / self.peak_flops_per_s

    def predicted(self, tokens_per_step: int) -> Predicted:
        """What the plan expects of a step."""
        seconds = self.placement.step_time_s
        mfu = None if seconds is None else self.mfu(tokens_per_step / seconds)
        return Predicted(seconds, self.placement.memory_gib, mfu)


@dataclass(frozen=True)
class Decisions:
    """What one process decides for all."""

    chip: ChipSpec
    speed: Speed
    compute: str
    placement: Placement
    choices: tuple[str, ...]


def assemble(run: RunSpec, decided: Mapping[str, Any] | None = None, crew: Crew | None = None) -> Assembly:
    """Everything that `run` describes, the weights at their random start, spread over the processes of `crew`.

    Args:
        decided: What was decided when the run was started, if it was before: `compute`, and what `Placement.decided`
            gives.

    Raises:
        ConfigError: no such device here, too little memory on it, no text, or too little of that.
    """
    crew = crew or Alone()
    tokenizer = check_inputs(run)
    chosen = crew.share(partial(_decide, run, decided, crew.size))
    chip, speed, compute, placement = chosen.chip, chosen.speed, chosen.compute, chosen.placement
    choices = list(chosen.choices)
    device = torch.device(chip.device or "cpu")
    # Reading bytes is quick; what a tokenizer has made of a text is worth keeping.
    keep = cache_dir() / "corpora" if isinstance(run.tokenizer, FileTokenizer) else None
    corpus = crew.in_turn(partial(load_corpus, run.data, run.tokenizer, keep))
    peak_meter = PeakMeter(device)
    model = crew.spread(partial(_build_model, run, device, placement.recompute), run, placement)
    choices += _kernel_choices(run, model, device)
    peak = speed.tflops.get(compute, 0.0) * crew.size
    return Assembly(
        model=model,
        optimizers=_optimizers(run, model),
        corpus=corpus,
        autocast=_autocast(device, run.precision, compute),
        compute=compute,
        device=device,
        forward_flops_per_token=run.model.flops(run.train.seq_len).total,
        flops_factor=FLOPS_FACTOR_FROZEN if isinstance(run.finetune, LoraFinetune) else FLOPS_FACTOR,
        peak_flops_per_s=peak * 1e12 if peak else None,
        hardware=_describe(chip, speed, compute),
        choices=tuple(choices),
        placement=placement,
        peak=peak_meter,
        baselines=_baselines(run, corpus) if crew.rank == 0 else {},
        sample=_sampler(run, partial(crew.sampling, model), tokenizer, device),
    )


def _decide(run: RunSpec, decided: Mapping[str, Any] | None, processes: int) -> Decisions:
    """Look at this machine, and choose what the settings leave open."""
    if processes == 1:
        check_processes(run, processes, shrunk=launched() is not None and decided is not None)
    machine = local_hardware(run.hardware)
    chip = machine.chip
    speed = measure(chip)
    compute, choices = _choose_precision(run.precision, speed, decided["compute"] if decided else None)
    if processes > 1 and isinstance(run.finetune, LoraFinetune):
        raise ConfigError("finetune.type: found 'lora'; trains in one process; use finetune=full in several")
    if processes > 1:
        placement = place_many(run, machine, processes, compute, _room_gib(chip), decided)
    else:
        seconds = predictor(run, machine, speed, compute)
        placement = place(run, compute=compute, room_gib=_room_gib(chip), seconds=seconds, decided=decided)
    return Decisions(chip, speed, compute, placement, (*choices, *placement.reasons))


def _optimizers(run: RunSpec, model: Decoder) -> list[torch.optim.Optimizer]:
    found = build_optimizers(model, run.optimizer, run.model.width_ratio)
    return found if run.train.ema is None else [*found, Ema(model.named_parameters(), run.train.ema)]


def _room_gib(chip: ChipSpec) -> float | None:
    """Memory that is free, and no more than the settings say that there is."""
    found = [room for room in (available_gib(chip.device or "cpu"), chip.memory_gib) if room is not None]
    return min(found, default=None)


def _build_model(run: RunSpec, device: torch.device, recompute: str, on_meta: bool) -> Decoder:
    # Made on the processor: the same seed gives the same weights on every device.
    torch.manual_seed(run.train.seed)
    dtype = DTYPES[run.precision.weights]
    model = build(run.model, "meta", dtype) if on_meta else initial_model(run, dtype).to(device)
    model.recompute = "layer" if recompute == "layer" else "none"
    model.decoding = run.kernels.decode
    for moe in model.moe_layers().values():
        moe.experts.backend = run.kernels.experts
    return model


def _choose_precision(spec: PrecisionSpec, speed: Speed, decided: str | None) -> tuple[str, list[str]]:
    """The dtype to compute in, and the reason for it unless the settings name it."""
    if spec.compute != "auto":
        return spec.compute, []
    if spec.weights == "bf16":
        return "bf16", ["precision bf16: so are the weights"]
    if decided is not None:
        return decided, [f"precision {decided}: as the run was started"]
    ratio = speed.tflops.get("bf16", 0.0) / speed.tflops["fp32"]
    if ratio >= CLEARLY_FASTER:
        return "bf16", [f"precision bf16: this machine multiplies bf16 matrices {ratio:.1f} times as fast as fp32"]
    how = f"at {ratio:.2g} times the speed of fp32" if ratio else "not at all"
    return "fp32", [f"precision fp32: this machine multiplies bf16 matrices {how}"]


def _autocast(device: torch.device, precision: PrecisionSpec, compute: str) -> Autocast:
    if compute == precision.weights:
        return nullcontext
    dtype = DTYPES[compute]

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype)

    return autocast


def _kernel_choices(run: RunSpec, model: Decoder, device: torch.device) -> list[str]:
    """How this process was set up, and what computes the experts if that was left open."""
    tuning = tuned() if device.type == "cpu" else None
    lines = [tuning.allocator, tuning.threads, tuning.products] if tuning else []
    if not model.moe_layers() or run.kernels.experts != "auto":
        return lines
    if tuning:
        return [*lines, tuning.experts]
    if device.type == "cpu":
        return ["experts grouped: tokens are sorted by expert once, and no expert copies its weights or outputs"]
    return ["experts grouped_mm: torch's grouped product never waits for the device to learn how many tokens came"]


def _describe(chip: ChipSpec, speed: Speed, compute: str) -> str:
    name = chip.name
    if chip.device == "cpu":
        cores, threads = num_cpus(), torch.get_num_threads()
        used = f"{threads} of {cores}" if threads < cores else str(cores)
        name = f"{used} {'core' if used == '1' else 'cores'} of {chip.name}"
    memory = f", {chip.memory_gib:.4g} GiB" if chip.memory_gib else ""
    peak = speed.tflops.get(compute)
    rate = f"{peak:.3g} TFLOP/s in {compute} (measured)" if peak else f"an unknown speed in {compute}"
    return f"{name}{memory}, matrix multiplication at {rate}"


def _baselines(run: RunSpec, corpus: Corpus) -> dict[str, float]:
    if not isinstance(run.tokenizer, BytesTokenizer) or len(corpus.train) < _LEAST_TOKENS:
        return {}
    rows = heldout_rows(corpus.heldout, run.train.seq_len, run.train.eval_tokens)
    return {"order-2 bytes": TrigramBaseline.fit(corpus.train).bits_per_byte(rows)}


def _sampler(
    run: RunSpec, writer: Callable[[], Decoder | None], tokenizer: Tokenizer, device: torch.device
) -> Callable[[str], str]:
    train, positions = run.train, run.model.embedding.positions

    def sample(prompt: str) -> str:
        """What the model writes after `prompt`, up to the end of the document."""
        model = writer()
        if model is None:
            return ""
        ids = tokenizer.encode(prompt) or [tokenizer.separator]
        room = train.sample_tokens if positions is None else min(train.sample_tokens, positions - len(ids))
        torch.manual_seed(train.seed)
        written = model.generate(
            torch.tensor([ids], device=device),
            max_new_tokens=max(0, room),
            temperature=train.sample_temperature,
            stop=[tokenizer.separator],
        )
        # A model may know more tokens than its tokenizer: their rows were never trained.
        tokens = written[0, len(ids) :].tolist()
        return tokenizer.decode(
            [token for token in tokens if token < tokenizer.vocab_size and token != tokenizer.separator]
        )

    return sample
