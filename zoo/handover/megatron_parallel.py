"""A layout as fields of Megatron-Core, and what of it has none."""

from __future__ import annotations

from zoo.handover.anatomy import Anatomy
from zoo.handover.fields import Call, Code, Field
from zoo.handover.hand import Hand
from zoo.handover.megatron_model import provider_of
from zoo.plan.layout import Layout
from zoo.plan.legal import ENDS, mixtures
from zoo.plan.question import Question
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.model import ModelSpec

MODULES = {
    "core_attn": "core_attn",
    "mla_up_proj": "mla_up_proj",
    "up_proj": "mla_up_proj",
    "moe_act": "moe_act",
    "layernorm": "layernorm",
    "norm": "layernorm",
    "mlp": "mlp",
    "moe": "moe",
    "shared_experts": "shared_experts",
}
"""Its `recompute_modules` by the planner's names. The planner's `act` is two of them (`_modules`)."""


def recomputes(spec: ModelSpec, name: str) -> bool:
    """Whether it can compute again what a setting of the planner names."""
    return name in ("none", "full") or bool(_modules(spec, name))


def _modules(spec: ModelSpec, name: str) -> list[str]:
    """The modules of a selective setting; none where it has no such setting."""
    if name == "selective":
        return ["core_attn"]
    kind, _, parts = name.partition(":")
    found: list[str] = []
    for part in parts.split(",") if kind == "selective" else ():
        if part == "act" and any(isinstance(block, MLPSpec) for block in spec.slots.values()):
            return []  # activations of dense blocks are kept there
        if part != "act" and part not in MODULES:
            return []
        found += ["layernorm", "moe_act"] if part == "act" else [MODULES[part]]
    return list(dict.fromkeys(found))


def objection(q: Question, layout: Layout, micro_batch: int) -> str | None:
    """Why a layout cannot be expressed."""
    spec, stages = q.spec, layout.pp * layout.vp
    hybrid = provider_of(Anatomy(spec)) == "HybridModelProvider"
    if hybrid and layout.vp > 1:
        return "HybridModelProvider takes no virtual stages: vp=1"
    if hybrid and spec.num_layers % layout.pp:
        return f"HybridModelProvider needs as many of the {spec.num_layers} layers on each stage: pp must divide them"
    if layout.shard not in (1, layout.dp * layout.cp):
        return f"weights are shared by all {layout.dp * layout.cp} devices along dp and cp, or by none: set shard so"
    if layout.shard > 1 and layout.pp > 1:
        return "zoo export does not write Megatron-FSDP with pipelines: pp=1 or shard=1"
    batches = q.global_batch // (micro_batch * layout.dp)
    if layout.vp > 1 and batches % layout.pp:
        return f"interleaved stages need a multiple of pp {layout.pp} micro-batches, there are {batches}"
    for block in spec.slots.values():
        groups = block.num_kv_heads if isinstance(block, AttentionSpec) else layout.tp
        if groups % layout.tp and layout.tp % groups:
            return f"tp {layout.tp} must divide the {groups} heads of keys, or be a multiple of them"
    if stages > 1 and stages > spec.num_layers:
        return f"pp * vp, {stages}, must not exceed the {spec.num_layers} layers"
    return None


def parallel_fields(hand: Hand) -> list[Field]:
    """Of the provider."""
    layout, origin = hand.layout, hand.origin
    made = [
        Field("tensor_model_parallel_size", layout.tp, origin("tp")),
        Field("sequence_parallel", layout.tp > 1, f"{origin('tp')}: along tp"),
        Field("pipeline_model_parallel_size", layout.pp, origin("pp")),
        Field("virtual_pipeline_model_parallel_size", layout.vp if layout.vp > 1 else None, origin("vp")),
        Field("context_parallel_size", layout.cp, origin("cp")),
    ]
    if mixtures(hand.question.spec):
        made.append(Field("expert_model_parallel_size", layout.ep, origin("ep")))
        made.append(Field("expert_tensor_parallel_size", layout.etp, origin("etp")))
    if layout.shard > 1:
        made.append(Field("gradient_accumulation_fusion", False, f"{origin('shard')}: shard={layout.shard}"))
    return made + _stages(hand)


def _stages(hand: Hand) -> list[Field]:
    """How layers are divided where their number does not divide evenly, as the planner assumes."""
    spec, stages = hand.question.spec, hand.layout.pp * hand.layout.vp
    mtp = spec.mtp.depth if spec.mtp and hand.mtp else 0
    if stages == 1 or spec.num_layers % stages == 0:
        return []
    names = ("account_for_loss_in_pipeline_split", "account_for_embedding_in_pipeline_split")
    for ends in range(1, ENDS + 1):
        if (spec.num_layers + ends) % stages == 0 and not mtp:
            return [Field(name, True, "plan: it stands for a layer") for name in names[:ends]]
    return [Field("pipeline_model_parallel_layout", stage_list(spec.num_layers, stages, mtp), "plan: uneven stages")]


def stage_list(num_layers: int, stages: int, mtp: int = 0) -> Code:
    """Layers dealt evenly to stages, embedding and loss counted as one layer each."""
    units = num_layers + ENDS
    sizes = [units // stages + (1 if stage < units % stages else 0) for stage in range(stages)]
    parts = []
    for stage, size in enumerate(sizes):
        first, last = stage == 0, stage == stages - 1
        layers = size - first - last
        texts = ['"embedding"'] if first else []
        texts += [f'*["decoder"] * {layers}'] if layers else []
        texts += ['"mtp"'] * mtp + ['"loss"'] if last else []
        parts.append(f"[{', '.join(texts)}]")
    return Code(f"[{', '.join(parts)}]")


def recompute_fields(hand: Hand) -> list[Field]:
    """Of the provider."""
    name, origin = hand.best.recompute, hand.origin("recompute")
    if name == "none":
        return [Field("recompute_granularity", None, origin)]
    if name == "full":
        return [
            Field("recompute_granularity", "full", origin),
            Field("recompute_method", "uniform", f"{origin}: every layer"),
            Field("recompute_num_layers", 1, f"{origin}: every layer by itself"),
        ]
    return [
        Field("recompute_granularity", "selective", origin),
        Field("recompute_modules", _modules(hand.question.spec, name), f"{origin}: {name}"),
    ]


def unsharded(hand: Hand) -> Call:
    """The DistributedDataParallelConfig: optimizer states are shared by all replicas, weights where shard says so."""
    made = [
        Field("use_distributed_optimizer", True, "plan: states are shared along dp and cp"),
        Field("grad_reduce_in_fp32", True, "plan: 4 bytes of a gradient on a link"),
        Field("overlap_grad_reduce", True, "plan: work hides it"),
        Field("overlap_param_gather", True, "plan: work hides it"),
        Field("check_for_nan_in_grad", True, "zoo export"),
    ]
    if hand.layout.shard > 1:
        origin = f"{hand.origin('shard')}: shard={hand.layout.shard}"
        made.append(Field("use_megatron_fsdp", True, origin))
        made.append(Field("data_parallel_sharding_strategy", "optim_grads_params", origin))
    return Call("DistributedDataParallelConfig", tuple(made))
