"""Routers: which experts a token is sent to, and with which weights."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from zoo.spec.base import Spec, TypedSpec, choice_of, problem, register_spec


class RouterSpec(TypedSpec):
    """A rule that gives each token its experts and their weights. Arithmetic is fp32, or wider in an fp64 model."""

    arithmetic: Literal["mixed", "fp32", "model"] = "mixed"
    """How much is wider in an fp64 model: the product that makes the logits (`mixed`), nothing (`fp32`), or all
    (`model`). In other models these are the same."""

    def check_choice(self, num_experts: int, top_k: int) -> None:
        """Refuse a number of experts or of choices that the rule cannot serve.

        Raises:
            ValidationError: by `problem`, its field relative to the description that holds `top_k` and `router`.
        """

    def shrunk(self) -> Self:
        """The same rule for the 8 experts of a tiny twin (`zoo.spec.twin`), of which at most 2 are chosen."""
        return self


@register_spec
class TopKRouterSpec(RouterSpec):
    """Score all experts, choose the best `top_k`, weigh them.

    The rules of released models are settings of this one: softmax then top-k, renormalised or not; top-k then softmax
    (`score_chosen`); sigmoid with a correction bias (arXiv:2408.15664) and expert groups (arXiv:2412.19437).
    """

    type: Literal["top_k"] = "top_k"
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    score_chosen: bool = False
    """Choose by the logits and score only the chosen ones among themselves."""
    normalize: bool = True
    """Divide the weights of the chosen experts by their sum."""
    normalize_eps: PositiveFloat = 1e-20
    """Added to that sum. The default only matters where scores of all chosen experts underflow to 0."""
    route_scale: float = 1.0
    """Factor on the weights."""
    correction_bias: bool = False
    """An offset per expert, set by balancing and not by gradient, that helps to choose and never weighs."""
    count_bias: bool = False
    """The correction bias is a parameter, though not a trained one: so some releases hold and count it."""
    num_groups: PositiveInt = 1
    top_groups: PositiveInt = 1
    """Only experts of the best `top_groups` of `num_groups` groups can be chosen."""
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    """A group is as good as its best expert (arXiv:2405.04434), or as the sum of its two best (arXiv:2412.19437)."""
    logit_bias: bool = False
    """A trained bias on the logits."""
    expert_scale: bool = False
    """A trained factor per expert on its weight."""
    weigh: Literal["output", "input"] = "output"
    """Where the weight acts: on the expert's output or on its input."""
    input_norm: bool = False
    """The router reads a weightless norm of its input times a trained vector times d_model ** -0.5."""

    @model_validator(mode="after")
    def _check(self) -> TopKRouterSpec:
        if self.top_groups > self.num_groups:
            raise problem("top_groups", self.top_groups, f"must be at most num_groups ({self.num_groups})")
        if self.count_bias and not self.correction_bias:
            raise problem("count_bias", True, "needs correction_bias")
        if self.score_chosen and (self.num_groups > 1 or self.correction_bias):
            raise problem("score_chosen", True, "cannot be combined with groups or a correction bias")
        return self

    def check_choice(self, num_experts: int, top_k: int) -> None:
        groups = ("router", "num_groups")
        if num_experts % self.num_groups:
            raise problem(groups, self.num_groups, f"must divide num_experts ({num_experts})")
        per_group = num_experts // self.num_groups
        if top_k > per_group * self.top_groups:
            raise problem("top_k", top_k, f"must be at most {per_group * self.top_groups}, the experts of top_groups")
        if self.num_groups > 1 and self.group_score == "top2_sum" and per_group < 2:
            raise problem(groups, self.num_groups, "must leave 2 experts in a group for group_score top2_sum")

    def shrunk(self) -> Self:
        """Groups of two, and fewer of them open where that was so."""
        if self.num_groups == 1:
            return self
        return self.replace(num_groups=4, top_groups=4 if self.top_groups == self.num_groups else 2)


@register_spec
class SparseMixerRouterSpec(RouterSpec):
    """SparseMixer-2 (arXiv:2409.12136): `top_k` rounds, each choosing the best expert that is left.

    The weight is the softmax over the experts of that round whose logit is close to the best one. The paper samples the
    expert in training; here the best one is taken, so that training is a function of its inputs. Where the best one is
    taken, the paper's gradient is that of this softmax.
    """

    type: Literal["sparse_mixer"] = "sparse_mixer"
    jitter: PositiveFloat = 0.01
    """Close: (best - logit) / max(|logit|, best) is at most 2 * jitter."""


class ChoiceSpec(Spec):
    """How many experts there are, how many a token is sent to, and who decides."""

    num_experts: PositiveInt
    top_k: PositiveInt
    router: choice_of(RouterSpec) = TopKRouterSpec()  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check_choice(self) -> ChoiceSpec:
        if self.top_k > self.num_experts:
            raise problem("top_k", self.top_k, f"must be at most num_experts ({self.num_experts})")
        self.router.check_choice(self.num_experts, self.top_k)
        return self
