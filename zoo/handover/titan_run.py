"""Training and layout as torchtitan's Trainer.Config, and what of a layout it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zoo.handover.fields import Call, Code, Field
from zoo.handover.hand import Hand, Target
from zoo.handover.training import Training
from zoo.plan.layout import Layout
from zoo.plan.legal import mixtures
from zoo.plan.question import Question, divisors
from zoo.spec.attention import AttentionSpec

NAME = "torchtitan"
RECOMPUTED = {"none": None, "full": "FullAC.Config", "selective_op": "SelectiveAC.Config"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def objection(q: Question, layout: Layout, micro_batch: int) -> str | None:
    """Why a layout cannot be expressed."""
    spec, members = q.spec, layout.dp * layout.cp
    if layout.shard == 1 and members > 1:
        return f"optimizer states of whole weights are not shared there: set shard to a divisor of {members} above 1"
    if layout.shard % layout.cp or layout.dp % max(1, layout.shard // layout.cp):
        return (
            f"shard {layout.shard} must be a multiple of cp {layout.cp}, and its quotient a divisor of dp {layout.dp}"
        )
    if mixtures(spec):
        if layout.ep == 1 and layout.etp != layout.tp:
            return (
                f"without ep the width of experts is cut along tp: etp {layout.etp} must be tp {layout.tp}, or set ep"
            )
        if layout.ep > 1 and layout.etp > 1:
            return f"experts are cut by number or by width, not both: ep {layout.ep}, etp {layout.etp}"
        if layout.shard * layout.tp % layout.ep:
            return f"ep {layout.ep} must divide shard * tp, {layout.shard} * {layout.tp}"
    for block in spec.slots.values():
        heads = block.num_kv_heads if isinstance(block, AttentionSpec) else layout.tp
        if heads % layout.tp:
            return f"tp {layout.tp} must divide the {heads} heads of keys"
    if spec.head.tied and layout.pp > 1:
        return "tied tables do not go with pipeline stages: pp=1"
    if q.seq_len % (layout.tp * (2 * layout.cp if layout.cp > 1 else 1)):
        return f"tp {layout.tp} and twice cp {layout.cp} must divide seq_len {q.seq_len}"
    stages = layout.pp * layout.vp
    if layout.vp > 1 and _stages_of(spec.num_layers, stages) != stages:
        return f"its layers per stage do not come to {stages} stages of {spec.num_layers} layers: choose another vp"
    return None


def pins(q: Question) -> Sequence[Mapping[str, int]]:
    """Searches in which something may be found: weights are shared there, by as many devices as you please."""
    ways: list[dict[str, int]] = [{"etp": 1}] if mixtures(q.spec) and "etp" not in q.fixed else [{}]
    if "shard" in q.fixed or q.machine.num_devices == 1:
        return ways
    return [{**way, "shard": shard} for way in ways for shard in divisors(q.machine.num_devices) if shard > 1]


TARGET = Target(
    NAME,
    lambda spec, name: name in RECOMPUTED,
    tuple(DTYPES),
    objection,
    pins,
    {"engine": "fsdp", "mtp": False},
)


def _layers_per_stage(num_layers: int, stages: int) -> int:
    """Embedding and head count as a layer each, as torchtitan's defaults have it."""
    return -(-(num_layers + 2) // stages)


def _stages_of(num_layers: int, stages: int) -> int:
    return -(-(num_layers + 2) // _layers_per_stage(num_layers, stages))


def trainer(hand: Hand, training: Training) -> Call:
    """The Trainer.Config."""
    recompute = RECOMPUTED[hand.best.recompute]
    again = Call(recompute, ()) if recompute else None
    seed = Field("seed", training.train.seed, training.origin("train.seed"))
    return Call(
        "Trainer.Config",
        (
            Field("model_spec", Code("model_spec()"), "above"),
            Field("loss", Code(_loss(hand)), "model.vocab_size"),
            Field("training", _training(hand, training)),
            Field("parallelism", _parallelism(hand)),
            Field("activation_checkpoint", again, f"{hand.origin('recompute')}: {hand.best.recompute}"),
            Field("optimizer", _optimizer(training)),
            Field("lr_scheduler", _scheduler(training)),
            Field("checkpoint", Code("CheckpointManager.Config(enable=True, interval=500)"), "zoo export"),
            Field("metrics", Code("MetricsProcessor.Config(log_freq=10)"), "zoo export"),
            Field("debug", Call("DebugConfig", (seed,))),
            Field("dataloader", Code('HuggingFaceTextDataLoader.Config(dataset="c4_test")'), "zoo export: a stand-in"),
            Field("hf_assets_path", "./tests/assets/tokenizer", "zoo export: a stand-in"),
        ),
    )


def _loss(hand: Hand) -> str:
    inner = f"CrossEntropyLoss.Config(global_vocab_size={hand.question.spec.vocab_size})"
    return f"ChunkedLossWrapper.Config(loss_fn={inner})"


def _training(hand: Hand, training: Training) -> Call:
    best, origin = hand.best, hand.origin
    pipelined = best.layout.pp > 1
    local = best.global_batch // best.layout.dp if pipelined else best.micro_batch
    graphs = pipelined or (best.layout.ep > 1)
    return Call(
        "TrainingConfig",
        (
            Field(
                "local_batch_size",
                local,
                f"{origin('global_batch')}: all of a step" if pipelined else origin("micro_batch"),
            ),
            Field("global_batch_size", best.global_batch, origin("global_batch")),
            Field("seq_len", best.seq_len, origin("seq_len")),
            Field("steps", training.train.steps, training.origin("train.steps")),
            Field("max_norm", training.train.clip_norm or float("inf"), training.origin("train.clip_norm")),
            Field("dtype", "float32", "zoo: weights are fp32"),
            Field("mixed_precision_param", DTYPES[best.precision], origin("precision")),
            Field("disable_cuda_graphs", graphs, "torchtitan: not with pipelines or this dispatch of experts"),
        ),
    )


def _parallelism(hand: Hand) -> Call:
    layout, origin = hand.layout, hand.origin
    sharded = max(1, layout.shard // layout.cp)
    made = [
        Field("data_parallel_replicate_degree", layout.dp // sharded, f"{origin('dp')}: dp * cp / shard"),
        Field("data_parallel_shard_degree", sharded, f"{origin('shard')}: shard / cp"),
        Field("tensor_parallel_degree", layout.tp, origin("tp")),
        Field("enable_sequence_parallel", True, "plan: along tp"),
        Field("context_parallel_degree", layout.cp, origin("cp")),
        Field("pipeline_parallel_degree", layout.pp, origin("pp")),
        Field("expert_parallel_degree", layout.ep, origin("ep")),
    ]
    if layout.pp > 1:
        micro = Field("pipeline_parallel_microbatch_size", hand.best.micro_batch, origin("micro_batch"))
        schedule = "Interleaved1F1B" if layout.vp > 1 else "1F1B"
        made += [micro, Field("pipeline_parallel_schedule", schedule, f"{origin('vp')}: vp={layout.vp}")]
    if layout.vp > 1:
        each = _layers_per_stage(hand.question.spec.num_layers, layout.pp * layout.vp)
        made.append(Field("pipeline_parallel_layers_per_stage", each, f"{origin('vp')}: vp={layout.vp}"))
    return Call("ParallelismConfig", tuple(made))


def _optimizer(training: Training) -> Call:
    adamw = training.optimizer
    made = (("lr", adamw.lr), ("betas", tuple(adamw.betas)), ("eps", adamw.eps), ("weight_decay", adamw.weight_decay))
    return Call(
        "default_adamw", tuple(Field(name, value, training.origin(f"optimizer.{name}")) for name, value in made)
    )


def _scheduler(training: Training) -> Call:
    steps = training.train.steps
    made = [
        Field("warmup_steps", training.warmup, training.origin("schedule.warmup")),
        Field("decay_type", "cosine" if training.schedule.type == "cosine" else "linear", training.origin("schedule")),
        Field("min_lr_factor", training.min_ratio, training.origin("schedule.min_ratio")),
    ]
    if training.schedule.type == "wsd":
        ratio = float(f"{training.decay / steps:.12g}")
        made.append(Field("decay_ratio", ratio, training.origin("schedule.decay")))
    return Call("LRSchedulersContainer.Config", tuple(made))
