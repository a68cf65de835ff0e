"""Routers: which experts a token is sent to, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from zoo.blocks.autocast import without_autocast
from zoo.spec.base import decode, mirrored
from zoo.spec.norm import NormSpec
from zoo.spec.router import ChoiceSpec, RouterSpec, SparseMixerRouterSpec, TopKRouterSpec


class Routing(NamedTuple):
    """What a router decided about each token. `c` is the number of choices, `e` of experts."""

    weights: Tensor
    """[..., c] fp32: factor on the output (or input) of each chosen expert."""
    indices: Tensor
    """[..., c] int64: the chosen experts, all different."""
    scores: Tensor
    """[..., e] fp32: how much the token wants each expert, without correction bias; not negative."""
    logits: Tensor
    """[..., e] fp32."""


class RouterModule(nn.Module):
    """Base of all routers: a matrix that makes logits, and a rule that makes choices of them.

    A subclass names its description in `describes` and gives the rule, `route`. All arithmetic is fp32, also under
    autocast; what is fp64 in an fp64 model says `RouterSpec.arithmetic`.
    """

    describes: ClassVar[type[RouterSpec]]
    correction_bias: Tensor | None
    """[e] fp32: moved by balancing; added to the scores when choosing, never when weighing."""
    exact_parameters: ClassVar[tuple[str, ...]] = ("correction_bias",)
    """Parameters whose dtype stays fp32 whatever that of the model."""
    weighs_input: bool = False
    """Whether the weights act on the inputs of the experts instead of their outputs."""

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        spec: RouterSpec | None = None,
        *,
        norm: NormSpec | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            d_model: width of the input.
            num_experts: experts to choose from.
            top_k: experts that a token is sent to.
            spec: the description; or give its fields as `options`.
            norm: the model's norm, which gives its eps to a norm inside the router.

        Raises:
            ConfigError: the rule cannot serve these numbers, or the options are not a sound description.
        """
        super().__init__()
        described = {"type": self.describes.model_fields["type"].default, **options} if spec is None else spec
        choice = {"num_experts": num_experts, "top_k": top_k, "router": described}
        self.choice = decode(ChoiceSpec, choice, type(self).__name__)
        self.num_experts, self.top_k, self.spec = num_experts, top_k, self.choice.router
        self.norm_spec = norm or NormSpec()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.register_buffer("correction_bias", None)
        RouterModule.init_weights(self, std=0.02, out_std=0.02)

    def init_weights(self, std: float, out_std: float) -> None:
        del out_std
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Routing:
        """x [..., d_model]."""
        with without_autocast(x.device):
            return self.route(self.logits(x))

    def logits(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., e] fp32, or fp64."""
        arithmetic = self.choice.router.arithmetic
        wide = torch.float32 if arithmetic == "fp32" else torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        return logits if arithmetic == "model" else logits.to(torch.float32)

    def route(self, logits: Tensor) -> Routing:
        """Choose by logits [..., e] fp32."""
        raise NotImplementedError


def build_router(spec: RouterSpec, d_model: int, num_experts: int, top_k: int, norm: NormSpec) -> RouterModule:
    """The module of a description: the class in the mirrored module of `zoo.blocks` that describes itself by it."""
    router: type[RouterModule] = mirrored(
        type(spec), "blocks", RouterModule, lambda found: getattr(found, "describes", None)
    )
    return router(d_model, num_experts, top_k, spec, norm=norm)


class Router(RouterModule):
    """Score all experts, choose the best, weigh them: every option of `TopKRouterSpec`.

    `Router(512, 64, 8, score="sigmoid", correction_bias=True)(x)` routes x [..., 512] to 8 of 64 experts.
    """

    describes = TopKRouterSpec
    spec: TopKRouterSpec

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, spec: TopKRouterSpec | None = None, **options: Any
    ) -> None:
        super().__init__(d_model, num_experts, top_k, spec, **options)
        spec = self.spec
        self.weighs_input = spec.weigh == "input"
        self.bias = nn.Parameter(torch.zeros(num_experts)) if spec.logit_bias else None
        self.expert_scale = nn.Parameter(torch.ones(num_experts)) if spec.expert_scale else None
        self.input_scale = nn.Parameter(torch.ones(d_model)) if spec.input_norm else None
        if spec.correction_bias:
            self._hold_bias(torch.zeros(num_experts, dtype=torch.float32))

    def init_weights(self, std: float, out_std: float) -> None:
        super().init_weights(std, out_std)
        for start, tensor in ((0.0, self.bias), (1.0, self.expert_scale), (1.0, self.input_scale)):
            if tensor is not None:
                nn.init.constant_(tensor, start)
        if self.correction_bias is not None:
            nn.init.zeros_(self.correction_bias)

    def logits(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            normed = F.rms_norm(x.to(torch.float32), x.shape[-1:], eps=self.norm_spec.eps).to(wide)
            x = normed * (self.input_scale.to(wide) * x.shape[-1] ** -0.5)
        logits = super().logits(x)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def route(self, logits: Tensor) -> Routing:
        spec, score = self.spec, _SCORES[self.spec.score]
        scores = score(logits)
        if spec.score_chosen:
            chosen, indices = logits.topk(self.top_k, dim=-1)
            weights = score(chosen)
        else:
            indices = self._best(scores.detach())
            weights = scores.gather(-1, indices)
        if spec.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + spec.normalize_eps)
        if self.expert_scale is not None:
            weights = weights * self.expert_scale[indices]
        if spec.route_scale != 1:
            weights = weights * spec.route_scale
        return Routing(weights, indices, scores, logits)

    def _best(self, scores: Tensor) -> Tensor:
        """The chosen experts [..., c] by scores [..., e], with groups and correction bias."""
        spec = self.spec
        merit = scores if self.correction_bias is None else scores + self.correction_bias
        if spec.num_groups > 1:
            grouped = rearrange(merit, "... (n e) -> ... n e", n=spec.num_groups)
            of_group = grouped.amax(-1) if spec.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
            best = of_group.topk(spec.top_groups, dim=-1).indices
            kept = torch.zeros_like(of_group, dtype=torch.bool).scatter(-1, best, True)
            merit = grouped.masked_fill(~kept[..., None], -math.inf).flatten(-2)
        return merit.topk(self.top_k, dim=-1).indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        exact = self.correction_bias
        super()._apply(fn, recurse)
        # A bias that moves in steps of 0.001 would stand still in bf16, so it follows to devices but not to dtypes.
        if exact is not None and self.correction_bias is not None and self.correction_bias.dtype != exact.dtype:
            self._hold_bias(exact.detach().to(self.correction_bias.device))
        return self

    def _hold_bias(self, bias: Tensor) -> None:
        del self.correction_bias
        if self.spec.count_bias:
            self.correction_bias = nn.Parameter(bias, requires_grad=False)
        else:
            self.register_buffer("correction_bias", bias)


def _sqrt_softplus(logits: Tensor) -> Tensor:
    # Without a floor, the gradient of the root at a softplus that underflows is no number.
    return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": _sqrt_softplus,
}


class SparseMixerRouter(RouterModule):
    """The rule of `SparseMixerRouterSpec`."""

    describes = SparseMixerRouterSpec
    spec: SparseMixerRouterSpec

    def route(self, logits: Tensor) -> Routing:
        left = logits
        weights, indices = [], []
        for _ in range(self.top_k):
            best, chosen = left.max(-1, keepdim=True)
            far = (best - logits) / logits.abs().clamp(min=best) > 2 * self.spec.jitter
            weights.append(left.masked_fill(far, -math.inf).softmax(-1).gather(-1, chosen))
            indices.append(chosen)
            left = left.scatter(-1, chosen, -math.inf)
        return Routing(torch.cat(weights, -1), torch.cat(indices, -1), logits.softmax(-1), logits)
