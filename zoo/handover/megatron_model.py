"""A model as a provider of Megatron-Bridge: GPTModelProvider, MLAModelProvider or HybridModelProvider."""

from __future__ import annotations

from zoo.handover.anatomy import Anatomy
from zoo.handover.fields import Field, runs
from zoo.handover.megatron_blocks import (
    activation_fields,
    attention_fields,
    dense_fields,
    latent_fields,
    mamba_fields,
    moe_fields,
)
from zoo.handover.refusals import Refusals
from zoo.spec.attention import AttentionSpec
from zoo.spec.block import FFNSpec, MixerSpec
from zoo.spec.mamba2 import Mamba2Spec
from zoo.spec.mla import MLASpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.model import ModelSpec
from zoo.spec.moe import MoESpec
from zoo.spec.router import TopKRouterSpec

SYMBOLS: dict[type, str] = {Mamba2Spec: "M", AttentionSpec: "*", MLPSpec: "-", MoESpec: "E"}
"""Of layers that are one block each (Megatron-Core's `hybrid_layer_allocation.Symbols`)."""


def provider_of(anatomy: Anatomy) -> str:
    """The class that a model needs."""
    if any(isinstance(block, Mamba2Spec) for block in anatomy.spec.slots.values()):
        return "HybridModelProvider"
    if any(isinstance(block, MLASpec) for block in anatomy.used(MixerSpec).values()):
        return "MLAModelProvider"
    return "GPTModelProvider"


def model_fields(anatomy: Anatomy, mtp: bool, refusals: Refusals) -> list[Field]:
    """The fields of the provider that describe the model; what it cannot express goes to `refusals`."""
    spec, provider = anatomy.spec, provider_of(anatomy)
    anatomy.refuse_strange(refusals)
    if spec.embedding.positions is not None:
        refusals.no("model.embedding.positions", spec.embedding.positions, "takes its table to be as long as seq_len")
    made = [
        Field("hidden_size", spec.d_model, "model.d_model"),
        Field("vocab_size", spec.vocab_size, "model.vocab_size"),
        Field("should_pad_vocab", True, "zoo export: rows are added where tp does not divide the vocabulary"),
        Field("make_vocab_size_divisible_by", 1, "zoo export: and no more of them"),
        Field("share_embeddings_and_output_weights", spec.head.tied, "model.head.tied"),
        Field("hidden_dropout", 0.0, "zoo: no dropout"),
        Field("attention_dropout", 0.0, "zoo: no dropout"),
        Field("init_method_std", spec.init.std, "model.init.std"),
        *_norm(spec, refusals),
    ]
    if not spec.init.depth_scaled:
        refusals.no("model.init.depth_scaled", False, "scales what writes to the residual stream by depth")
    layers = _hybrid_layers if provider == "HybridModelProvider" else _whole_layers
    made += layers(anatomy, refusals)
    made += _mixers(anatomy, refusals) + _ffns(anatomy, refusals)
    return made + _mtp(anatomy, mtp, refusals)


def _norm(spec: ModelSpec, refusals: Refusals) -> list[Field]:
    norm = spec.norm
    if norm.weight == "none" or (norm.type == "layer" and not norm.bias):
        refusals.no("model.norm", norm.type, "norms with a weight, and with an offset where it subtracts the mean")
    return [
        Field("normalization", {"rms": "RMSNorm", "layer": "LayerNorm"}[norm.type], "model.norm.type"),
        Field("layernorm_epsilon", norm.eps, "model.norm.eps"),
        Field("layernorm_zero_centered_gamma", norm.weight == "plus_one", "model.norm.weight"),
    ]


def _whole_layers(anatomy: Anatomy, refusals: Refusals) -> list[Field]:
    """Every layer an attention and a channel mixer."""
    made = [Field("num_layers", anatomy.spec.num_layers, "model.layers")]
    if None in anatomy.mixers or None in anatomy.ffns:
        refusals.no("model.layers", anatomy.spec.layers, "has both a mixer and an ffn in each layer without Mamba-2")
    moe = [int(isinstance(anatomy.spec.slots.get(slot or ""), MoESpec)) for slot in anatomy.ffns]
    if any(moe):
        made.append(Field("moe_layer_freq", runs(moe), "model.layers: 1 has experts"))
    return made


def _hybrid_layers(anatomy: Anatomy, refusals: Refusals) -> list[Field]:
    """Every layer one block."""
    text = ""
    for mixer, ffn in zip(anatomy.mixers, anatomy.ffns, strict=True):
        for slot in (mixer, ffn):  # a layer of both is the same function as one of each
            if slot is not None:
                text += SYMBOLS.get(type(anatomy.spec.slots[slot]), "?")
    return [Field("hybrid_layer_pattern", text, "model.layers: M Mamba-2, * attention, - dense, E experts")]


def _mixers(anatomy: Anatomy, refusals: Refusals) -> list[Field]:
    """Of sequence mixers."""
    made: list[Field] = []
    blocks = anatomy.used(MixerSpec)
    kinds = {type(block) for block in blocks.values()}
    for slot, block in blocks.items():
        if not isinstance(block, (AttentionSpec, MLASpec, Mamba2Spec)):
            refusals.no(f"model.{slot}.type", block.type, "is written for attention, latent attention and Mamba-2")
    for kind in (MLASpec, Mamba2Spec):
        same = [slot for slot, block in blocks.items() if isinstance(block, kind)]
        if len(same) > 1:
            refusals.no(f"model.{same[1]}", same[1], f"has one of its kind, {same[0]}")
    if {AttentionSpec, MLASpec} <= kinds or {MLASpec, Mamba2Spec} <= kinds:
        refusals.no("model.layers", anatomy.spec.layers, "does not mix latent attention with other mixers here")
    if AttentionSpec in kinds:
        made += attention_fields(anatomy, refusals)
    for slot, block in blocks.items():
        if isinstance(block, MLASpec):
            made += latent_fields(slot, block, anatomy.spec, refusals)
        elif isinstance(block, Mamba2Spec):
            made += mamba_fields(slot, block, refusals)
    return made


def _ffns(anatomy: Anatomy, refusals: Refusals) -> list[Field]:
    """Of channel mixers."""
    dense = [(slot, block) for slot, block in anatomy.used(FFNSpec).items() if isinstance(block, MLPSpec)]
    sparse = [(slot, block) for slot, block in anatomy.used(FFNSpec).items() if isinstance(block, MoESpec)]
    for slot, block in anatomy.used(FFNSpec).items():
        if not isinstance(block, (MLPSpec, MoESpec)):
            refusals.no(f"model.{slot}.type", block.type, "has dense blocks and experts")
    for same in (dense, sparse):
        if len(same) > 1:
            refusals.no(f"model.{same[1][0]}", same[1][0], f"has one of its kind, {same[0][0]}")
    made: list[Field] = []
    if dense or sparse:
        made += activation_fields([*dense, *sparse], refusals)
    made += [field for slot, block in dense[:1] for field in dense_fields(slot, block, refusals)]
    made += [field for slot, block in sparse[:1] for field in moe_fields(slot, block, refusals)]
    return made + _biases(anatomy, refusals)


def _biases(anatomy: Anatomy, refusals: Refusals) -> list[Field]:
    """One switch for the biases of all matrices, the routers' included."""
    found: dict[str, bool] = {}
    for slot, block in {**anatomy.used(MixerSpec), **anatomy.used(FFNSpec)}.items():
        names = [name for name in ("out_bias", "bias") if name in type(block).model_fields]
        found |= {f"model.{slot}.{name}": getattr(block, name) for name in names}
        router = getattr(block, "router", None)
        if isinstance(router, TopKRouterSpec):
            found[f"model.{slot}.router.logit_bias"] = router.logit_bias
        if isinstance(block, AttentionSpec) and block.out_bias and not block.qkv_bias:
            refusals.no(f"model.{slot}.qkv_bias", False, "has it wherever the output has one")
    if len(set(found.values())) > 1:
        some = next(path for path, value in found.items() if value)
        refusals.no(some, True, f"has one switch for {', '.join(found)}")
    return [Field("add_bias_linear", any(found.values()), "all biases but those of queries, keys and values")]


def _mtp(anatomy: Anatomy, mtp: bool, refusals: Refusals) -> list[Field]:
    """Blocks of multi-token prediction, where they are trained."""
    described = anatomy.spec.mtp
    if described is None or not mtp:
        return []
    made = [
        Field("mtp_num_layers", described.depth, "model.mtp.depth"),
        Field("mtp_loss_scaling_factor", described.loss_weight, "model.mtp.loss_weight"),
        Field("mtp_use_repeated_layer", described.shared, "model.mtp.shared"),
    ]
    block = Anatomy(anatomy.spec.replace(layers=described.layers, mtp=None))
    if provider_of(anatomy) == "HybridModelProvider":
        text = _hybrid_layers(block, refusals)[0].value
        return [*made, Field("mtp_hybrid_override_pattern", text, "model.mtp.layers")]
    if (block.mixers, block.ffns) != (anatomy.mixers[-1:], anatomy.ffns[-1:]):
        refusals.no("model.mtp.layers", described.layers, "makes such blocks as the last layer is")
    return made
