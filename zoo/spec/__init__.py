"""What a thing IS: its numbers, validated. Nothing here imports torch."""

from zoo.spec.attention import AttentionSpec
from zoo.spec.base import ConfigError, Spec, decode
from zoo.spec.block import BlockSpec, FFNSpec, MixerSpec
from zoo.spec.delta import DeltaSpec
from zoo.spec.mamba1 import Mamba1Spec
from zoo.spec.mamba2 import Mamba2Spec
from zoo.spec.mla import MLASpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.model import KindSpec, ModelSpec
from zoo.spec.moe import BalanceSpec, MoESpec
from zoo.spec.norm import NormSpec
from zoo.spec.parallel import ParallelSpec
from zoo.spec.rope import RopeScaling, RopeSpec
from zoo.spec.router import ChoiceSpec, RouterSpec, SparseMixerRouterSpec, TopKRouterSpec
from zoo.spec.short_conv import ShortConvSpec

__all__ = [
    "AttentionSpec",
    "BalanceSpec",
    "BlockSpec",
    "ChoiceSpec",
    "ConfigError",
    "DeltaSpec",
    "FFNSpec",
    "KindSpec",
    "MLASpec",
    "MLPSpec",
    "Mamba1Spec",
    "Mamba2Spec",
    "MixerSpec",
    "MoESpec",
    "ModelSpec",
    "NormSpec",
    "ParallelSpec",
    "RopeScaling",
    "RopeSpec",
    "RouterSpec",
    "ShortConvSpec",
    "SparseMixerRouterSpec",
    "Spec",
    "TopKRouterSpec",
    "decode",
]
