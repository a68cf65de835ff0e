"""Sparse upcycling (arXiv:2212.05055): a dense model becomes a mixture of experts that computes the same at first."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from zoo.spec.base import ConfigError, decode
from zoo.spec.mlp import ActivationSpec, MLPSpec
from zoo.spec.model import KindSpec, ModelSpec
from zoo.spec.moe import MoESpec
from zoo.spec.router import TopKRouterSpec

if TYPE_CHECKING:
    from zoo.decoder import Decoder


@overload
def upcycle(
    dense: ModelSpec, num_experts: int, top_k: int, *, granularity: int = ..., seed: int = ..., **options: Any
) -> ModelSpec: ...


@overload
def upcycle(
    dense: Decoder, num_experts: int, top_k: int, *, granularity: int = ..., seed: int = ..., **options: Any
) -> Decoder: ...


def upcycle(
    dense: ModelSpec | Decoder, num_experts: int, top_k: int, *, granularity: int = 1, seed: int = 0, **options: Any
) -> ModelSpec | Decoder:
    """The mixture of experts that a dense model becomes: every MLP is copied into experts, the router is random.

    The weights of the chosen experts sum to 1 and all experts are alike, so the output is the dense model's, to
    rounding. With a granularity g, an expert is the g-th part of the MLP's hidden units (arXiv:2410.07524); the router
    begins with equal rows for the parts of one copy, so that a token is sent to whole copies.

    Args:
        dense: a description, which gives the new one; or a model, which gives a new model with its weights.
        num_experts: routed experts in a layer, a multiple of `granularity`.
        top_k: experts that a token is sent to, a multiple of `granularity`.
        granularity: parts that the MLP is cut into; must divide its width.
        seed: of the router.
        options: further fields of `MoESpec`: `balance={"aux_loss": 0.01}`, `router={"score": "sigmoid"}`.

    Raises:
        ConfigError: there is no MLP, the numbers do not divide, or the experts' weights would not sum to 1.
    """
    if isinstance(dense, ModelSpec):
        return upcycled_spec(dense, num_experts, top_k, granularity, options)
    from zoo.decoder import build

    if dense.embed.weight.dtype == torch.float64:  # sums to 1 of fp32 weights would be all that is left of fp64
        options["router"] = {"arithmetic": "model", **options.get("router", {})}
    spec = upcycled_spec(dense.spec, num_experts, top_k, granularity, options)
    weights = dense.state_dict()
    dtypes = {name: value.dtype for name, value in weights.items()}
    model = build(spec, dense.embed.weight.device, dense.embed.weight.dtype, init=False)
    parameters = UpcycledParameters(weights, dtypes, spec, granularity, seed)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            target.copy_(parameters[name])
    return model.train(dense.training)


def upcycled_spec(
    dense: ModelSpec, num_experts: int, top_k: int, granularity: int, options: Mapping[str, Any]
) -> ModelSpec:
    """The description that `upcycle` makes; the slot `mlp` becomes `moe`."""
    mlps = {name: block for name, block in dense.slots.items() if isinstance(block, MLPSpec)}
    if not mlps:
        raise ConfigError(f"upcycle: {dense.name} has no MLP in a slot of its own that could become experts")
    for name, value in {"num_experts": num_experts, "top_k": top_k}.items():
        if value % granularity:
            raise ConfigError(f"upcycle.{name}: found {value}; must be a multiple of granularity ({granularity})")
    names = {name: "moe" if name == "mlp" and "moe" not in dense.slots else name for name in dense.slots}
    slots = {
        names[name]: _experts(block, num_experts, top_k, granularity, options) if isinstance(block, MLPSpec) else block
        for name, block in dense.slots.items()
    }
    kinds = {name: _renamed(kind, names) for name, kind in dense.kinds.items()}
    return dense.replace(name=f"{dense.name}_x{num_experts}", card=None, slots=slots, kinds=kinds)


def _experts(mlp: MLPSpec, num_experts: int, top_k: int, granularity: int, options: Mapping[str, Any]) -> MoESpec:
    if mlp.d_ffn % granularity:
        raise ConfigError(f"upcycle.granularity: found {granularity}; must divide the width of the MLP ({mlp.d_ffn})")
    described = {
        "num_experts": num_experts,
        "top_k": top_k,
        "d_expert": mlp.d_ffn // granularity,
        **{name: getattr(mlp, name) for name in ActivationSpec.model_fields},
        **options,
        # The parts of a copy share its weight, so each has the g-th part of it.
        "router": {"type": "top_k", "route_scale": float(granularity), **options.get("router", {})},
    }
    moe = decode(MoESpec, described, "upcycle")
    router = moe.router
    sums_to_1 = isinstance(router, TopKRouterSpec) and (
        router.normalize or (router.score_chosen and router.score == "softmax")
    )
    grouped = granularity > 1 and getattr(router, "num_groups", 1) > 1
    if (
        not sums_to_1
        or grouped
        or router.route_scale != granularity
        or router.weigh != "output"
        or moe.num_shared_experts
    ):
        raise ConfigError(
            "upcycle: the weights of a token's experts must sum to 1; leave router.normalize, router.route_scale, "
            "router.weigh, router.num_groups and num_shared_experts as they are by default"
        )
    if moe.d_expert * granularity != mlp.d_ffn or moe.d_latent is not None:
        raise ConfigError("upcycle: d_expert and d_latent follow from the MLP; leave them out")
    return moe


def _renamed(kind: KindSpec, names: Mapping[str, str]) -> KindSpec:
    slots = {branch: getattr(kind, branch) for branch in ("mixer", "ffn", "beside")}
    return kind.replace(**{branch: slot and names[slot] for branch, slot in slots.items()})


_BLOCK = re.compile(r"(?P<block>.*\.(?:ffn|beside)\.)(?P<part>experts|router)\.(?P<name>\w+)")
_STARTS = {"bias": 0.0, "correction_bias": 0.0, "expert_scale": 1.0, "input_scale": 1.0}
"""What a router has beside its matrix begins so that it changes nothing."""


class UpcycledParameters(Mapping[str, Tensor]):
    """The parameters of the mixture, by name, each made of the dense model's when it is asked for."""

    def __init__(
        self,
        dense: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        spec: ModelSpec,
        granularity: int = 1,
        seed: int = 0,
    ) -> None:
        """
        Args:
            dense: the dense model's parameters.
            dtypes: of these.
            spec: the description of the mixture.
        """
        from zoo.decoder import build

        self._dense, self._std, self._granularity, self._seed = dense, spec.init.std, granularity, seed
        made = build(spec, "meta").state_dict()
        self.shapes = {name: tuple(value.shape) for name, value in made.items()}
        self.dtypes = {
            name: value.dtype if name.endswith("correction_bias") else dtypes.get(name) or dtypes[self._like(name)]
            for name, value in made.items()
        }

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._dense:
            return self._dense[name]
        match = _BLOCK.fullmatch(name)
        if match is None:
            raise KeyError(name)
        if match["part"] == "experts":
            return self._stack(match["block"], match["name"], self.shapes[name][0])
        if match["name"] == "weight":
            return self._router(match["block"], *self.shapes[name]).to(self.dtypes[name])
        return torch.full(self.shapes[name], _STARTS[match["name"]], dtype=self.dtypes[name])

    @staticmethod
    def _like(name: str) -> str:
        """The dense parameter whose dtype a new one takes."""
        return _BLOCK.sub(r"\g<block>down.weight", name)

    def _stack(self, block: str, name: str, num_experts: int) -> Tensor:
        """Stacked experts: number j g + i is part i of copy j."""
        kind = "bias" if name.endswith("_bias") else "weight"
        names = name.removesuffix("_bias").split("_")
        dense = [self._dense[f"{block}{part}.{kind}"] for part in names]
        granularity = self._granularity
        if names != ["down"]:
            cut = torch.cat([part.unflatten(0, (granularity, -1)) for part in dense], 1)
        elif kind == "weight":
            cut = dense[0].unflatten(1, (granularity, -1)).transpose(0, 1)
        else:
            cut = (dense[0] / granularity).expand(granularity, -1)
        return cut.repeat(num_experts // granularity, *[1] * (cut.ndim - 1))

    def _router(self, block: str, num_experts: int, d_model: int) -> Tensor:
        """A random row [d] for each copy, the same for all its parts."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {block}".encode()))
        rows = torch.randn(num_experts // self._granularity, d_model, generator=generator) * self._std
        return rows.repeat_interleave(self._granularity, 0)
