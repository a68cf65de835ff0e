"""A mixture-of-experts layer on this CPU beats every peer's in time and memory, and nears a dense layer's speed.

Peers run in the same process with the same settings (`zoo.tuning`), weights and inputs, in turns; outputs are compared
first. transformers comes with the tests; litgpt takes part where it is installed. torchtitan's experts multiply in bf16
only, OLMo-core's and Megatron's need a GPU. fp32: what this CPU multiplies without units of its own is no use.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

from benchmarks.harness import Row, interleaved, peak_extra_mib
from zoo.blocks.mlp import MLP
from zoo.blocks.moe import MoE
from zoo.native.library import library
from zoo.tuning import tune


@dataclass(frozen=True)
class Shape:
    """Of a layer."""

    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    num_shared: int = 0

    def __str__(self) -> str:
        shared = " + shared" if self.num_shared else ""
        return f"d {self.d_model}, {self.top_k} of {self.num_experts} experts of {self.d_expert}{shared}"

    @property
    def chosen_bytes(self) -> int:
        """Of the fp32 weights that one token reads."""
        return 4 * 3 * self.d_model * self.d_expert * (self.top_k + self.num_shared)


SHAPES = {"A": Shape(512, 256, 64, 8), "B": Shape(1024, 2048, 8, 2), "C": Shape(1024, 512, 128, 8, 1)}
PEERS = ("transformers grouped_mm", "transformers eager", "transformers batched_mm", "litgpt")
BYTES_OF_A_COPY = 4 * 2**30
"""batched_mm copies the weights of every choice: it takes part up to this."""


PASSES = {"training": ((True, 4096, 2),), "inference": ((False, 512, 9), (False, 64, 15), (False, 1, 60))}
"""Whether there is a backward pass, tokens, rounds."""
PARTS = tuple(f"{shape} {what}" for shape in SHAPES for what in (*PASSES, "memory"))


def rows(part: str | None = None) -> list[Row]:
    """All rows, or those of one of `PARTS`."""
    print(*tune(), sep="\n", flush=True)
    found = [row for name in PARTS if part in (None, name) for row in _part_rows(name)]
    return found if part else summary(found)


def _part_rows(part: str) -> list[Row]:
    name, what = part.split()
    return _memory_rows(SHAPES[name]) if what == "memory" else layer_rows(SHAPES[name], PASSES[what])


def layer_rows(shape: Shape, passes: tuple[tuple[bool, int, int], ...]) -> list[Row]:
    layers = build(shape)
    compare(layers, shape)
    found = []
    for train, num_tokens, rounds in passes:
        calls = {name: call(layer, shape.d_model, num_tokens, train) for name, layer in layers.items()}
        calls = {name: run for name, run in calls.items() if _feasible(name, shape, num_tokens, train)}
        if train:
            width = shape.d_expert * (shape.top_k + shape.num_shared)
            calls["dense"] = call(MLP(shape.d_model, d_ffn=width), shape.d_model, num_tokens, train)
        found += _compared(shape, f"{'training' if train else 'inference'}, {num_tokens} tokens", calls, rounds)
    return found


def _compared(shape: Shape, what: str, calls: dict[str, Callable[[], None]], rounds: int) -> list[Row]:
    seconds = interleaved(calls, rounds, warmup=1)
    mine, dense = seconds.pop("zoo"), seconds.pop("dense", None)
    peer = min(seconds, key=lambda name: seconds[name])
    others = ", ".join(f"{name} {_ms(other)}" for name, other in seconds.items() if name != peer)
    found = [Row(f"{shape}: {what}", _ms(mine), f"{peer} {_ms(seconds[peer])}", seconds[peer] / mine, others)]
    if dense is not None:
        found.append(Row(f"{shape}: {what}", _ms(mine), f"dense SwiGLU of the same FLOPs {_ms(dense)}", dense / mine))
    if what.endswith(" 1 tokens"):
        limit = shape.chosen_bytes / bandwidth()
        found.append(Row(f"{shape}: {what}", _ms(mine), f"reading the chosen weights {_ms(limit)}", limit / mine))
    return found


def _feasible(name: str, shape: Shape, num_tokens: int, train: bool) -> bool:
    if name == "transformers eager":
        return not train  # each expert makes a gradient of the size of all of them
    return name != "transformers batched_mm" or (
        not train and num_tokens * shape.chosen_bytes < BYTES_OF_A_COPY and num_tokens < 64
    )


def summary(found: list[Row]) -> list[Row]:
    """The rows, and the geometric means over the shapes that were measured, against the fastest peer of each."""
    found, means = [row for row in found if not row.what.startswith("geometric mean")], []
    for words in ("training, 4096 tokens", "inference, 512 tokens", "inference, 64 tokens", "inference, 1 tokens"):
        ratios = [row.ratio for row in found if row.what.endswith(words) and row.other.startswith(PEERS)]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            means.append(Row(f"geometric mean: {words}", "", "the fastest peer of each shape", mean, "bar 1.3"))
    return found + means


def _memory_rows(shape: Shape) -> list[Row]:
    names = ("zoo", "litgpt", "transformers grouped_mm")  # one of these two is the fastest peer
    sizes = {name: _apart(shape, name) for name in names if name in build_names()}
    mine = sizes.pop("zoo")
    return [
        Row(f"{shape}: extra memory of training, 4096 tokens", f"{mine:.0f} MiB", f"{name} {size:.0f} MiB", size / mine)
        for name, size in sizes.items()
    ]


def _apart(shape: Shape, name: str) -> float:
    """The peak of a first call, gradients included, in a process of its own whose allocator gives all back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(training_peak_mib, shape, name).result()


def training_peak_mib(shape: Shape, name: str) -> float:
    library()  # the kernels alone: settings of the allocator would blur what is measured
    layer = build(shape, (name,))[name]
    call(layer, shape.d_model, 2, True)()
    layer.zero_grad()
    return peak_extra_mib(call(layer, shape.d_model, 4096, True))


class WithShared(nn.Module):
    """A peer's layer and the MLP that all tokens pass, as models with shared experts put them together."""

    def __init__(self, routed: nn.Module, shared: nn.Module) -> None:
        super().__init__()
        self.routed, self.shared = routed, shared

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared(x)


def build_names() -> tuple[str, ...]:
    return ("zoo", *(name for name in PEERS if name != "litgpt" or _has_litgpt()))


def build(shape: Shape, names: tuple[str, ...] | None = None) -> dict[str, nn.Module]:
    """The layers, all with the same weights; transformers' share theirs."""
    torch.manual_seed(0)
    ours = MoE(
        shape.d_model,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        d_expert=shape.d_expert,
        num_shared_experts=shape.num_shared,
    )
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            # Inputs are of size 1: logits of size 1 make even loads, activations of size 1 even outputs.
            parameter.normal_(std=(shape.d_expert if name.endswith("down") else shape.d_model) ** -0.5)
    makers = {name: (_litgpt if name == "litgpt" else _transformers) for name in build_names()[1:]}
    wanted = build_names() if names is None else names
    found: dict[str, nn.Module] = {"zoo": ours} if "zoo" in wanted else {}
    for name in wanted:
        if name != "zoo":
            found[name] = makers[name](shape, ours, name.rpartition(" ")[2])
    return found


def _transformers(shape: Shape, ours: MoE, implementation: str) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=shape.d_model,
        moe_intermediate_size=shape.d_expert,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        layer = Qwen3MoeSparseMoeBlock(config)
    layer.experts.gate_up_proj = nn.Parameter(ours.experts.gate_up.detach())
    layer.experts.down_proj = nn.Parameter(ours.experts.down.detach())
    layer.gate.weight = nn.Parameter(ours.router.weight.detach())
    return layer if ours.shared is None else WithShared(layer, _shared(ours))


def _shared(ours: MoE) -> nn.Module:
    """transformers' MLP with the weights of our shared experts."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

    assert ours.shared is not None
    width, d_model = ours.shared.up.weight.shape
    with torch.device("meta"):
        mlp = Qwen3MoeMLP(Qwen3MoeConfig(hidden_size=d_model), intermediate_size=width)
    for name in ("gate", "up", "down"):
        getattr(mlp, f"{name}_proj").weight = nn.Parameter(getattr(ours.shared, name).weight.detach())
    return mlp


def _has_litgpt() -> bool:
    try:
        import litgpt.model  # noqa: F401
    except ImportError:
        return False
    return True


def _litgpt(shape: Shape, ours: MoE, implementation: str) -> nn.Module:
    from litgpt.config import Config
    from litgpt.model import LLaMAMoE

    config = Config(
        n_embd=shape.d_model,
        n_head=8,
        n_expert=shape.num_experts,
        n_expert_per_token=shape.top_k,
        moe_intermediate_size=shape.d_expert,
        n_shared_expert=shape.num_shared or None,
        mlp_class_name="LLaMAMoE",
        bias=False,
    )
    with torch.device("meta"):
        layer = LLaMAMoE(config)
    layer.gate.weight = nn.Parameter(ours.router.weight.detach())
    mlps = [*layer.experts, *([layer.shared_experts] if shape.num_shared else [])]
    sources = list(zip(*ours.experts.gate_up.detach().chunk(2, 1), ours.experts.down.detach(), strict=True))
    if ours.shared is not None:
        sources.append(tuple(getattr(ours.shared, name).weight.detach() for name in ("gate", "up", "down")))
    for mlp, parts in zip(mlps, sources, strict=True):
        for name, part in zip(("fc_1", "fc_2", "proj"), parts, strict=True):
            getattr(mlp, name).weight = nn.Parameter(part)
    return layer


def compare(layers: dict[str, nn.Module], shape: Shape) -> None:
    """All layers give the same outputs."""
    x = torch.randn(1, 8, shape.d_model)
    with torch.no_grad():
        outputs = {name: _output(layer, x) for name, layer in layers.items()}
    for output in outputs.values():
        torch.testing.assert_close(output, outputs["zoo"], rtol=1e-4, atol=1e-4)


def call(layer: nn.Module, d_model: int, num_tokens: int, train: bool) -> Callable[[], None]:
    """One call on fresh tokens, so that the experts' loads change from call to call as they do in training."""
    layer.train(train)

    def run() -> None:
        x = torch.randn(1, num_tokens, d_model, requires_grad=train)
        if train:
            layer.zero_grad()
            _output(layer, x).backward(torch.full_like(x, 0.1))
        else:
            with torch.no_grad():
                _output(layer, x)

    return run


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    result = layer(x)
    return result[0] if isinstance(result, tuple) else result


def bandwidth() -> float:
    """Bytes a second of reading memory: numbers that no cache holds, each read once."""
    numbers = torch.ones(2**26)
    seconds = interleaved({"read": lambda: torch.sum(numbers)}, rounds=9)["read"]
    return numbers.nbytes / seconds


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
