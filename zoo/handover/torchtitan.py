"""A planned run as a recipe of torchtitan: one Python file with a function that makes its Trainer.Config.

Names are those of torchtitan 0.3.0, whose configurations are Python (`tests/handover/torchtitan.json`).
"""

from __future__ import annotations

import math

from zoo.handover.anatomy import Anatomy
from zoo.handover.fields import Call, Code, Field, runs, source
from zoo.handover.hand import Hand
from zoo.handover.names import names_of
from zoo.handover.refusals import Refusals
from zoo.handover.titan_blocks import attention, dense, latent, moe, norm
from zoo.handover.titan_run import NAME, TARGET, trainer
from zoo.handover.training import Training
from zoo.spec.attention import AttentionSpec
from zoo.spec.block import MixerSpec
from zoo.spec.mla import MLASpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.model import ModelSpec
from zoo.spec.moe import MoESpec

__all__ = ["TARGET", "recipe"]

IMPORTS = """\
from functools import partial

import torch.nn as nn

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    default_adamw,
    register_moe_load_balancing_hook,
)
from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear
from torchtitan.models.common.config_utils import (
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer
"""


def recipe(hand: Hand, training: Training) -> str:
    """The file.

    Raises:
        ConfigError: the model has what torchtitan cannot express; one line for each.
    """
    refusals, spec = Refusals(NAME), hand.question.spec
    anatomy = Anatomy(spec)
    anatomy.refuse_strange(refusals)
    _refuse(anatomy, hand, refusals)
    kinds = {kind: _layer(anatomy, kind, refusals) for kind in dict.fromkeys(spec.layer_kinds)}
    refusals.raise_all()
    names = names_of("torchtitan")[_family(anatomy)]
    model = _model(spec, names["model"])
    made = trainer(hand, training)
    notes = [*refusals.notes, "Data and tokenizer are stand-ins: put your own in their place."]
    head = [
        '"""' + "\n".join(hand.summary()),
        "",
        *notes,
        "",
        "written by zoo export; a comment says who decided a field",
    ]
    head += ["start: torchrun --nproc-per-node=N -m torchtitan.train --module recipe --config recipe", '"""', ""]
    latent_too = "Attention, " if _family(anatomy) == "mla" else ""
    imports = f"{IMPORTS}from {names['module']}.model import {latent_too}{names['block']}, {names['model']}\n"
    imports += f"from {names['module']}.parallelize import {names['parallelize']}\n"
    parts = [
        "\n".join(head) + imports,
        _constants(anatomy, hand.best.seq_len),
        *(f"def {kind}_layer():\n    return {source(layer, 4)}" for kind, layer in kinds.items()),
        f"LAYERS = {runs([Code(f'{kind}_layer') for kind in spec.layer_kinds])}  # model.layers",
        f"def model():\n    return {source(model, 4)}",
        f"def model_spec():\n    return {source(_spec(hand, names), 4)}",
        f"def recipe():\n    return {source(made, 4)}",
    ]
    return "\n\n\n".join(parts) + "\n"


def _family(anatomy: Anatomy) -> str:
    return "mla" if any(isinstance(block, MLASpec) for block in anatomy.used(MixerSpec).values()) else "gqa"


def _refuse(anatomy: Anatomy, hand: Hand, refusals: Refusals) -> None:
    """What is about the model as a whole."""
    spec = anatomy.spec
    if spec.embedding.positions is not None:
        refusals.no("model.embedding.positions", spec.embedding.positions, "has rotary positions alone")
    if spec.norm.type != "rms" or spec.norm.weight not in ("plain", "fp32", "wide"):
        refusals.no("model.norm", f"{spec.norm.type}, {spec.norm.weight}", "has RMS norms with a plain weight")
    if hand.mtp:
        refusals.no("mtp", True, "predicts further tokens with a loss of its own: set mtp=false to train without")
    if None in anatomy.mixers or None in anatomy.ffns:
        refusals.no("model.layers", spec.layers, "has both a mixer and an ffn in each layer")
    if spec.head.tied and hand.layout.pp > 1:
        refusals.no("model.head.tied", True, "does not tie tables over pipeline stages: set pp=1")
    kinds = {type(block) for block in anatomy.used(MixerSpec).values()}
    if {AttentionSpec, MLASpec} <= kinds:
        refusals.no("model.layers", spec.layers, "does not mix latent attention with other mixers here")
    context = spec.card.context if spec.card else hand.best.seq_len
    if hand.best.seq_len > context:
        refusals.no("seq_len", hand.best.seq_len, f"refuses sequences beyond the model's context, {context}")


def _layer(anatomy: Anatomy, kind: str, refusals: Refusals) -> Call:
    """The configuration of a layer."""
    spec = anatomy.spec
    mixer, ffn = spec.kinds[kind].mixer or "", spec.kinds[kind].ffn or ""
    made = [
        Field("attention_norm", norm(spec.d_model, spec.norm.eps)),
        Field("ffn_norm", norm(spec.d_model, spec.norm.eps)),
    ]
    block = spec.slots.get(mixer)
    if isinstance(block, AttentionSpec):
        made.append(Field("attention", attention(mixer, block, spec, refusals)))
    elif isinstance(block, MLASpec):
        made.append(Field("attention", latent(mixer, block, spec, refusals)))
    elif block is not None:
        refusals.no(f"model.{mixer}.type", block.type, "is written for attention and latent attention")
    below = spec.slots.get(ffn)
    if isinstance(below, MLPSpec):
        made.append(Field("feed_forward", dense(ffn, below, spec, refusals)))
    elif isinstance(below, MoESpec):
        made.append(Field("moe", moe(ffn, below, spec, refusals)))
    elif below is not None:
        refusals.no(f"model.{ffn}.type", below.type, "has dense blocks and experts")
    return Call(f"{names_of('torchtitan')[_family(anatomy)]['block']}.Config", tuple(made))


def _constants(anatomy: Anatomy, seq_len: int) -> str:
    spec = anatomy.spec
    out = spec.init.std / math.sqrt(anatomy.num_writes) if spec.init.depth_scaled else spec.init.std
    context, origin = (spec.card.context, "model.card.context") if spec.card else (seq_len, "seq_len")
    return "\n".join(
        (
            f'INSIDE = {{"weight": partial(nn.init.normal_, std={spec.init.std})}}  # model.init.std',
            f'OUT = {{"weight": partial(nn.init.normal_, std={out:.12g})}}  # model.init: {anatomy.num_writes} writes',
            'ONES = {"weight": nn.init.ones_}  # zoo: norms start neutral',
            'EXPERTS = {"w1_EFD": INSIDE["weight"], "w3_EFD": INSIDE["weight"], "w2_EDF": OUT["weight"]}  # model.init',
            f"CONTEXT = {context}  # {origin}",
        )
    )


def _model(spec: ModelSpec, name: str) -> Call:
    table = Code("skip_param_init") if spec.head.tied else Code('INSIDE["weight"]')
    embedding = Call(
        "Embedding.Config",
        (
            Field("num_embeddings", spec.vocab_size, "model.vocab_size"),
            Field("embedding_dim", spec.d_model, "model.d_model"),
            Field("param_init", Code(f'{{"weight": {table}}}'), "zoo: model.init"),
        ),
    )
    head = Call(
        "Linear.Config",
        (
            Field("in_features", spec.d_model, "model.d_model"),
            Field("out_features", spec.vocab_size, "model.vocab_size"),
            Field("param_init", Code("INSIDE"), "zoo: model.init"),
        ),
    )
    return Call(
        f"{name}.Config",
        (
            Field("vocab_size", spec.vocab_size, "model.vocab_size"),
            Field("dim", spec.d_model, "model.d_model"),
            Field("enable_weight_tying", spec.head.tied, "model.head.tied"),
            Field("tok_embeddings", embedding),
            Field("layers", Code("[layer() for layer in LAYERS]"), "model.layers"),
            Field("norm", norm(spec.d_model, spec.norm.eps)),
            Field("lm_head", head),
        ),
    )


def _spec(hand: Hand, names: dict[str, str]) -> Call:
    return Call(
        "ModelSpec",
        (
            Field("name", "zoo", "zoo export"),
            Field("flavor", hand.names["model"], "user"),
            Field("model", Code("model()"), "above"),
            Field("parallelize_fn", Code(names["parallelize"]), "torchtitan's for such blocks"),
            Field("pipelining_fn", Code("pipeline_llm"), "torchtitan's for language models"),
            Field("post_optimizer_build_fn", Code("register_moe_load_balancing_hook"), "model.moe.balance"),
            Field("state_dict_adapter", None, "zoo export: from random weights; zoo convert makes checkpoints"),
        ),
    )
