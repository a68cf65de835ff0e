"""Mixture of experts: router, experts, shared experts, balancing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from zoo.spec.base import Spec, problem, register_spec
from zoo.spec.block import FFNSpec, scaled
from zoo.spec.mlp import ActivationSpec
from zoo.spec.router import ChoiceSpec


class BalanceSpec(Spec):
    """What keeps the experts evenly loaded while training. Zero switches a part off."""

    aux_loss: NonNegativeFloat = 0.0
    """Coefficient of E * sum_i f_i P_i (arXiv:2101.03961): f_i the share of choices that go to expert i, P_i its mean
    share of a token's scores. 1 when even, E / top_k when all tokens choose the same experts without a doubt."""
    level: Literal["batch", "sequence"] = "batch"
    """What f and P are taken over: all tokens of a micro-batch, or each sequence by itself. By sequence, f counts the
    choices that scores alone would make, without correction bias and groups (arXiv:2412.19437, equations 17 to 20)."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of mean(logsumexp(logits) ** 2) (arXiv:2202.08906)."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Step of the correction bias after each optimizer step: + rate * sign(mean load - load) (arXiv:2408.15664)."""


@register_spec
class MoESpec(ActivationSpec, ChoiceSpec, FFNSpec):
    """Routed experts, with optional shared experts and an optional narrower space that the routed experts work in."""

    type: Literal["moe"] = "moe"
    d_expert: PositiveInt
    """Width of one routed expert."""
    num_shared_experts: NonNegativeInt = 0
    """Experts that every token passes; they are one MLP of their summed width."""
    d_shared_expert: PositiveInt | None = None
    """Width of one shared expert; absent: d_expert."""
    shared_gate: bool = False
    """The shared experts' output is multiplied by sigmoid(w x)."""
    combine: Literal["model", "fp32"] = "model"
    """Of the sum of routed and shared outputs: in the model's dtype, or in fp32."""
    d_latent: PositiveInt | None = None
    """Routed experts work on a projection of this width; absent: on d_model."""
    latent_norm: bool = False
    """RMS norm of the combined latent output before it is projected back."""
    balance: BalanceSpec = Field(default_factory=BalanceSpec)

    @property
    def d_shared(self) -> int:
        """Summed width of the shared experts; 0 without them."""
        return self.num_shared_experts * (self.d_shared_expert or self.d_expert)

    def shrunk(self, d_model: int) -> MoESpec:
        """Eight experts of which a token passes one or two; widths in proportion."""
        return self.replace(
            num_experts=8,
            top_k=min(self.top_k, 2),
            router=self.router.shrunk(),
            d_expert=scaled(self.d_expert, d_model),
            num_shared_experts=min(self.num_shared_experts, 2),
            d_shared_expert=self.d_shared_expert and scaled(self.d_shared_expert, d_model),
            d_latent=self.d_latent and scaled(self.d_latent, d_model),
        )

    @model_validator(mode="after")
    def _check(self) -> MoESpec:
        if self.latent_norm and not self.d_latent:
            raise problem("latent_norm", True, "needs d_latent")
        if self.shared_gate and not self.num_shared_experts:
            raise problem("shared_gate", True, "needs num_shared_experts of at least 1")
        if self.balance.bias_update_rate and not getattr(self.router, "correction_bias", False):
            raise problem(
                ("balance", "bias_update_rate"), self.balance.bias_update_rate, "needs router.correction_bias"
            )
        return self
