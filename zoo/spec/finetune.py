"""What a run starts from: random weights, or those of a checkpoint, and which of them it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from zoo.spec.base import Items, Spec, TypedSpec, problem, register_spec


class FinetuneSpec(TypedSpec):
    """Where the weights of a run come from.

    Patterns are those of a shell over the parameters' names: `*.router.*`, `layers.0.*`, `*.mixer.[qv].weight`.
    """


@register_spec
class NoFinetune(FinetuneSpec):
    """Random weights, all of them trained."""

    type: Literal["none"] = "none"


class UpcycleSpec(Spec):
    """The dense model of the checkpoint becomes a mixture of experts before it is trained (`zoo.upcycling`)."""

    num_experts: PositiveInt
    """Routed experts of a layer, each a copy of the MLP, or of a part of it."""
    top_k: PositiveInt
    granularity: PositiveInt = 1
    """Parts that each copy is cut into."""
    aux_loss: NonNegativeFloat = 0.01
    """Coefficient of the balance loss."""


class FromCheckpoint(FinetuneSpec):
    """The weights, and with them the description of the model, come from a checkpoint."""

    path: str
    """Whatever `zoo.from_pretrained` opens."""

    @model_validator(mode="after")
    def _check_path(self) -> FromCheckpoint:
        if not self.path:
            raise problem("path", self.path, "must name a checkpoint: a directory, a GGUF file or a run of zoo")
        return self


@register_spec
class FullFinetune(FromCheckpoint):
    """All weights are trained, but those that are frozen."""

    type: Literal["full"] = "full"
    freeze: Items[str] = ()
    """Patterns of parameters that stay as they are. Correction biases rest with their router."""
    upcycle: UpcycleSpec | None = None


@register_spec
class LoraFinetune(FromCheckpoint):
    """Small matrices beside the weights are trained, the weights themselves rest (LoRA, arXiv:2106.09685).

    What the matrix W [out, in] does becomes W + alpha / rank * B A, A [rank, in] and B [out, rank]. Stacked experts get
    an A and a B each.
    """

    type: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    targets: Items[str] = ("layers.*",)
    """Patterns of the weights that are adapted. Adapters may stand beside any matrix of mixers and MLPs, and beside the
    experts' stacks; not beside routers, embeddings and the head."""

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / self.rank
