"""The arguments of the compiled kernels, field by field as in kernels.cpp, and programs of calls."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from zoo.spec.mlp import ActivationSpec

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What matrices and caches may be stored in, and what the kernels call it."""
NORMS = {"none": 0, "rms": 1, "layer": 2}
MASKS = {"causal": 0, "sliding": 1, "chunked": 2}
SQUASHES = {"none": 0, "sigmoid": 1, "softplus": 2}
SCORES = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}
ACTIVATIONS = {
    name: index
    for index, name in enumerate("silu gelu gelu_tanh relu relu2 clamped_swish clamped_silu silu_clamped situ".split())
}


def _fields(**kinds: str) -> list[tuple[str, Any]]:
    """Fields of a struct by the kinds of their values, in order."""
    types: dict[str, Any] = {"pointer": c_void_p, "int": c_int64, "real": c_double}
    return [(name, types.get(kind, kind)) for kind, names in kinds.items() for name in names.split()]


class Matrix(Structure):
    """[n, d], or a stack of such matrices."""

    _fields_ = _fields(pointer="weight bias", int="n d dtype stride bias_stride")


class Norm(Structure):
    _fields_ = [*_fields(int="type width"), *_fields(pointer="weight bias", real="eps")]


class NormCall(Structure):
    _fields_ = [("norm", Norm), *_fields(pointer="x y", int="rows")]


class AddCall(Structure):
    _fields_ = [*_fields(pointer="x branch opening", real="scale factor", int="rows width")]


class ProductCall(Structure):
    _fields_ = [("matrix", Matrix), *_fields(pointer="x y", int="rows squash")]


class RouteCall(Structure):
    _fields_ = _fields(
        pointer="logits correction expert_scale weights indices",
        int="rows experts choices score score_chosen normalize groups top_groups group_by_max",
        real="normalize_eps route_scale",
    )


class FeedCall(Structure):
    _fields_ = [
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        *_fields(pointer="x weights indices hidden y", int="rows choices activation weigh_input", real="limit"),
    ]


class PassInfo(Structure):
    """What changes from token to token."""

    _fields_ = _fields(int="past", pointer="padding")


class AttendCall(Structure):
    _fields_ = [
        *_fields(pointer="pass_info q k v gate scores y keys values cos sin sink"),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("v_norm", Norm),
        *_fields(
            int="rows heads groups d dv gate_width capacity length cache_dtype table_start half interleaved "
            "norm_after_rope mask window shared_kv",
            real="scale softcap clip value_scale query_beta query_context query_shift",
        ),
    ]


class Call(Structure):
    _fields_ = _fields(pointer="run arguments", int="wait")


NAMES: dict[type[Structure], str] = {
    NormCall: "zoo_norm",
    AddCall: "zoo_add",
    ProductCall: "zoo_product",
    RouteCall: "zoo_route",
    FeedCall: "zoo_feed",
    AttendCall: "zoo_attend",
}


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor's numbers. The caller keeps the tensor."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def matrix(weight: Tensor | None, bias: Tensor | None = None) -> Matrix:
    """weight [n, d] or a stack [e, n, d], bias [n] or [e, n] of the same dtype."""
    if weight is None:
        return Matrix()
    n, d = weight.shape[-2:]
    return Matrix(pointer(weight), pointer(bias), n, d, DTYPES[weight.dtype], n * d, n)


def feed_call(
    matrices: tuple[Matrix, Matrix, Matrix],
    spec: ActivationSpec,
    x: Tensor,
    weights: Tensor | None,
    indices: Tensor | None,
    hidden: Tensor,
    y: Tensor,
    weigh_input: bool = False,
) -> FeedCall:
    """MLPs of equal shape over x [b, d], weighed by `weights` [b, c] fp32 and chosen by `indices` [b, c] int64."""
    addresses = map(pointer, (x, weights, indices, hidden, y))
    choices = 1 if indices is None else indices.shape[1]
    activation, limit = ACTIVATIONS[spec.activation], spec.activation_limit or 0.0
    return FeedCall(*matrices, *addresses, len(x), choices, activation, weigh_input, limit)


def expert_matrices(
    first: Tensor, down: Tensor, first_bias: Tensor | None, down_bias: Tensor | None, gated: bool
) -> tuple[Matrix, Matrix, Matrix]:
    """Gate, up and down of stacked experts, as `zoo.blocks.grouped.ExpertWeights` has them; ungated: an empty gate."""
    up, out = matrix(first, first_bias), matrix(down, down_bias)
    if not gated:
        return Matrix(), up, out
    gate = matrix(first, first_bias)
    gate.n = up.n = gate.n // 2
    up.weight += up.n * up.d * first.itemsize
    if first_bias is not None:
        up.bias += up.n * first.itemsize
    return gate, up, out


class Program:
    """Calls in the order in which they are made, by one team of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._arguments: list[Structure] = []
        self._waits: list[bool] = []
        self._kept: list[Any] = []
        self._calls: ctypes.Array[Call] | None = None

    def __len__(self) -> int:
        return len(self._arguments)

    def call(self, arguments: Structure, *keep: Any, wait: bool = True) -> None:
        """Add a call.

        Args:
            keep: tensors and structs that `arguments` points to.
            wait: False when the call after this one needs nothing that it makes.
        """
        self._arguments.append(arguments)
        self._waits.append(wait)
        self._kept.append(keep)
        self._calls = None

    def run(self) -> None:
        if self._calls is None:
            made = [
                Call(ctypes.cast(getattr(self._library, NAMES[type(found)]), c_void_p), ctypes.addressof(found), wait)
                for found, wait in zip(self._arguments, self._waits, strict=True)
            ]
            self._calls = (Call * len(made))(*made)
        self._library.zoo_run(self._calls, len(self._calls), torch.get_num_threads())
