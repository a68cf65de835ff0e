"""What zoo's own training step does, operation by operation, read off a step on tensors without numbers.

A layer of each kind runs once or twice on the meta device; the rest is counting. So the list follows the code of the
blocks, and costs the same for a model of any size.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.blocks.roles import Role, role_of
from zoo.decoder import build
from zoo.plan.local import Op, Ops, StepOps
from zoo.plan.trunk import named_weights
from zoo.spec.model import ModelSpec
from zoo.spec.train import MuonSpec, OptimizerSpec
from zoo.train.muon import Muon
from zoo.train.optim import is_pair

_MATH = "exp exp_ silu sigmoid gelu tanh softplus log log1p sin cos _softmax _log_softmax _safe_softmax silu_backward"
_MATH += " gelu_backward sigmoid_backward tanh_backward softplus_backward _softmax_backward_data polar erf logsumexp"
_KINDS = {
    "math": _MATH,
    "select": "where masked_fill masked_fill_ tril triu",
    "reduce": "sum mean amax max min any linalg_vector_norm var",
    "gather": "embedding embedding_dense_backward index_select index gather scatter scatter_ scatter_add scatter_add_ "
    "index_add index_add_ index_put index_put_ _embedding_bag _index_put_impl_ _embedding_bag_forward_only",
    "sort": "sort topk searchsorted",
    "scan": "cumsum cumprod flip",
    "nothing": "empty new_empty empty_like empty_strided new_empty_strided promote_types",
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""Matrix products, and where their factors start among the arguments."""
_SAME = frozenset({"_unsafe_view", "alias", "detach", "lift_fresh", "set_"})
"""They give what they were given."""
_IS_META: Any = Tensor.is_meta.__get__  # type: ignore[attr-defined]
_GROUPED: Any = (F.grouped_mm, torch._grouped_mm)
LARGE_BYTES = 2**25
"""From here on the C library asks the system for memory each time, and that fills the pages with zeros first."""


def step_ops(spec: ModelSpec, batch: int, seq_len: int, optimizer: OptimizerSpec, backend: str = "auto") -> StepOps:
    """The operations of a step of one micro-batch.

    Args:
        batch: sequences of the micro-batch.
        backend: of the experts.
    """
    kinds = Counter(spec.layer_kinds)
    once = " ".join(kinds)
    pattern = {kind: f"{kind} {once}" for kind in kinds}
    forward, backward = _passes(spec.replace(layers=once), batch, seq_len, backend)
    layers_forward, layers_backward, total = Counter[Op](), Counter[Op](), forward + backward
    for kind, times in kinds.items():
        more = _passes(spec.replace(layers=pattern[kind]), batch, seq_len, backend)
        for found, base, layers in zip(more, (forward, backward), (layers_forward, layers_backward), strict=True):
            one = Counter(found)
            one.subtract(base)
            for op, count in one.items():
                layers[op] += count * times
                total[op] += count * (times - 1)
    return StepOps(_positive(total), _positive(layers_forward), **_update_ops(spec, optimizer))


def _positive(ops: Counter[Op]) -> Ops:
    return {op: count for op, count in ops.items() if count > 0}


def _passes(spec: ModelSpec, batch: int, seq_len: int, backend: str) -> tuple[Counter[Op], Counter[Op]]:
    model = build(spec, device="meta")
    for moe in model.moe_layers().values():
        experts = moe.experts
        experts.backend = backend  # type: ignore[assignment]
        rows = batch * seq_len * moe.spec.top_k
        chosen = experts.backend_for(torch.empty(0, experts.down.shape[1]), rows)
        # A kernel of our own cannot run without numbers; like torch's grouped one it is a single call for all experts.
        experts.backend = "grouped_mm" if chosen == "compiled" else chosen  # type: ignore[assignment]
    tokens = torch.zeros(batch, seq_len, dtype=torch.int64, device="meta")
    recorder = _Recorder(seq_len)
    with recorder, _AsOnProcessor(recorder):
        loss = model.loss(tokens, tokens).total
        forward = recorder.take()
        loss.backward()
    return forward, recorder.take()


class _Recorder(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self, seq_len: int) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.ops: Counter[Op] = Counter()
        self.num_rows = 0
        """Choices of experts that were last sorted."""

    def take(self) -> Counter[Op]:
        """What was counted since the last time."""
        taken, self.ops = self.ops, Counter()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":  # the largest position is all that a forward pass reads back
            return self.seq_len - 1
        if name == "searchsorted":
            self.num_rows = args[0].numel()
        out = func(*args, **(kwargs or {}))
        self.ops[_op(name, func, args, out)] += 1
        if not (func.is_view or name.endswith("_") or name in _SAME or func._overloadname.endswith("out")):
            for size in map(_bytes, _tensors((out,))):
                if size >= LARGE_BYTES:
                    self.ops[Op("fresh", (size,))] += 1
        return out


def _op(name: str, func: Any, args: Any, out: Any) -> Op:
    if name in _PRODUCTS:
        first, second = args[_PRODUCTS[name] :][:2]
        stack = first.shape[0] if first.ndim == 3 else 1
        return Op("product", (stack, first.shape[-2], second.shape[-1], first.shape[-1]))
    kind = _KIND.get(name, "stream")
    inputs = _tensors(args)
    result = next(iter(_tensors((out,))), None)
    if result is None or kind == "nothing" or func.is_view or name in _SAME:
        return Op("view")
    if kind in ("reduce", "sort", "scan"):
        return Op(kind, (max(part.numel() for part in (*inputs, result)),))
    if kind == "gather":
        return Op(kind, (min(_bytes(result), max((_bytes(part) for part in inputs), default=0)),))
    if kind == "stream" and not any(_scattered(part, result) for part in inputs):
        return Op(kind, (sum(_bytes(part) for part in (*inputs, result)),))
    return Op("strided" if kind == "stream" else kind, (result.numel(),))


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments or results, and those in lists among them."""
    found = [part for value in values for part in (value if isinstance(value, (tuple, list)) else (value,))]
    return [part for part in found if isinstance(part, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """That lie in memory: what is expanded counts once."""
    number = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        number *= size if stride else 1
    return number * tensor.element_size()


def _scattered(tensor: Tensor, result: Tensor) -> bool:
    """Whether neighbours of the result are no neighbours in an input."""
    if tensor.numel() < result.numel() or tensor.ndim == 0:
        return False
    return tensor.numel() == result.numel() and tensor.stride() != result.stride() and not tensor.is_contiguous()


class _AsOnProcessor(TorchFunctionMode):
    """What code does otherwise on the meta device: attention is fused, and rows go evenly to all experts."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_META:
            return False
        if func is Tensor.tolist:
            (ends,) = args
            return [self.recorder.num_rows * (index + 1) // ends.numel() for index in range(ends.numel())]
        if func in _GROUPED:
            return _Grouped.apply(*args[:2], self.recorder)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
            return func(*args, **kwargs)
        causal = bool(kwargs.get("is_causal"))
        return _Fused.apply(query, key, value, causal, self.recorder)


class _Grouped(torch.autograd.Function):
    """A product of rows with a stack of matrices that computes nothing and is counted."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stack: Tensor, recorder: _Recorder) -> Tensor:
        number, k, n = stack.shape
        ctx.sizes, ctx.recorder = (number, len(rows) // number, n, k), recorder
        ctx.save_for_backward(rows, stack)
        recorder.ops[Op("grouped", ctx.sizes)] += 1
        return rows.new_empty(len(rows), n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, stack = ctx.saved_tensors
        number, m, n, k = ctx.sizes
        for size in ((number, m, k, n), (number, k, n, m)):
            ctx.recorder.ops[Op("grouped", size)] += 1
        return torch.empty_like(rows), torch.empty_like(stack), None


class _Fused(torch.autograd.Function):
    """Attention that computes nothing and is counted as one operation each way."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, recorder: _Recorder) -> Tensor:
        batch, heads, queries, width = query.shape
        ctx.size = (batch * heads, queries, key.shape[-2], width, int(causal))
        ctx.recorder = recorder
        ctx.save_for_backward(query, key, value)
        recorder.ops[Op("attend", ctx.size)] += 1
        # As the kernel leaves it: heads innermost but for the channels.
        return query.new_empty(batch, queries, heads, width).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.recorder.ops[Op("attend_back", ctx.size)] += 1
        return (*(torch.empty_like(part) for part in ctx.saved_tensors), None, None)


def _update_ops(spec: ModelSpec, optimizer: OptimizerSpec) -> dict[str, Any]:
    """The fields of `StepOps` that say what the optimizer does."""
    muon: Counter[tuple[tuple[int, ...], int]] = Counter()
    shapes = [(weight.name, weight.shape) for weight in named_weights(spec)]
    fused = []
    for name, shape in shapes:
        role = role_of(name, torch.empty(shape, device="meta"))
        if isinstance(optimizer, MuonSpec) and role in (Role.MATRIX, Role.EXPERTS):
            muon[shape, 2 if is_pair(name) else 1] += 1
        else:
            fused.append(math.prod(shape))
    update: Counter[Op] = Counter()
    for (shape, num_parts), times in muon.items():
        for op, count in _muon_ops(shape, num_parts, optimizer).items():
            update[op] += times * count
    sizes = [math.prod(shape) for _, shape in shapes]
    return {
        "update": dict(update),
        "fused_elements": sum(fused),
        "fused_tensors": len(fused),
        "elements": sum(sizes),
        "tensors": len(sizes),
    }


def _muon_ops(shape: tuple[int, ...], num_parts: int, spec: Any) -> Counter[Op]:
    parameter = nn.Parameter(torch.empty(shape, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    group = {"params": [parameter], "num_parts": num_parts}
    optimizer = Muon([group], spec.lr, spec.momentum, spec.nesterov, spec.ns_steps, spec.weight_decay)
    optimizer.step()
    with _Recorder(1) as recorder:
        optimizer.step()
    return recorder.take()
