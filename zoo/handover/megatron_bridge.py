"""A planned run as a recipe of Megatron-Bridge: one Python file that makes its ConfigContainer.

Field names are those of megatron-bridge 0.6.2 with megatron-core 0.19.2 (`tests/handover/megatron_bridge.json`).
"""

from __future__ import annotations

from zoo.handover.anatomy import Anatomy
from zoo.handover.fields import Call, Code, Field, source
from zoo.handover.hand import Hand, Target
from zoo.handover.megatron_model import model_fields, provider_of
from zoo.handover.megatron_parallel import objection, parallel_fields, recompute_fields, recomputes, unsharded
from zoo.handover.names import names_of
from zoo.handover.refusals import Refusals
from zoo.handover.training import Training

NAME = "Megatron-Bridge"
PRECISIONS = {
    "fp32": None,
    "bf16": "bf16_mixed",
    "fp8": "bf16_with_fp8_current_scaling_mixed",
    "fp8_current_scaling": "bf16_with_fp8_current_scaling_mixed",
    "fp8_delayed": "bf16_with_fp8_delayed_scaling_mixed",
    "fp8_blockwise": "bf16_with_fp8_subchannel_scaling_mixed",
    "mxfp8": "bf16_with_mxfp8_mixed",
    "nvfp4": "bf16_with_nvfp4_mixed",
}
"""By the names of its registered MixedPrecisionConfigs; None: all in fp32."""
DECAYS = {"cosine": "cosine", "wsd": "WSD", "constant": "constant"}
TARGET = Target(NAME, recomputes, tuple(PRECISIONS), objection, defaults={"engine": "megatron"})
IMPORTS = """\
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    LoggerConfig,
    MockGPTDatasetConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
"""
RUN = """

if __name__ == "__main__":
    from {step} import forward_step
    from megatron.bridge.training.pretrain import pretrain

    pretrain(config=recipe(), forward_step_func=forward_step)
"""


def recipe(hand: Hand, training: Training) -> str:
    """The file.

    Raises:
        ConfigError: the model has what Megatron-Bridge cannot express; one line for each.
    """
    refusals = Refusals(NAME)
    container = _container(hand, training, refusals)
    refusals.raise_all()
    provider, modules = provider_of(Anatomy(hand.question.spec)), names_of("megatron_bridge")
    notes = [
        "Weight decay spares biases and norms, as zoo's does, but not the embedding tables, which zoo's does as well.",
        *refusals.notes,
        "Data and tokenizer are stand-ins: put your own in their place.",
    ]
    head = [
        '"""' + "\n".join(hand.summary()),
        "",
        *notes,
        "",
        "written by zoo export; a comment says who decided a field",
    ]
    head += [f"start: torchrun --nproc-per-node=N recipe.py, over {hand.best.num_devices} devices in all", '"""', ""]
    imports = f"from {modules[provider]} import {provider}\n{IMPORTS}"
    body = f"def recipe() -> ConfigContainer:\n    return {source(container, 4)}\n"
    torch = "import torch\n" if hand.best.precision == "fp32" else ""
    return "\n".join(head) + torch + imports + "\n\n" + body + RUN.format(step=modules["step"])


def _container(hand: Hand, training: Training, refusals: Refusals) -> Call:
    precision = PRECISIONS[hand.best.precision]
    return Call(
        "ConfigContainer",
        (
            Field("model", _model(hand, refusals)),
            Field("train", _train(hand, training)),
            Field("validation", _validation(training)),
            Field("optimizer", _optimizer(hand, training)),
            Field("scheduler", _scheduler(training)),
            Field("ddp", unsharded(hand)),
            Field("mixed_precision", precision, hand.origin("precision")),
            Field("dataset", _dataset(hand, training)),
            Field("tokenizer", _tokenizer(hand)),
            Field("checkpoint", _checkpoint(hand)),
            Field("logger", Call("LoggerConfig", (Field("log_interval", 10, "zoo export"),))),
            Field("rng", Call("RNGConfig", (Field("seed", training.train.seed, training.origin("train.seed")),))),
        ),
    )


def _model(hand: Hand, refusals: Refusals) -> Call:
    anatomy = Anatomy(hand.question.spec)
    made = model_fields(anatomy, hand.mtp, refusals)
    made.append(Field("seq_length", hand.best.seq_len, hand.origin("seq_len")))
    made += parallel_fields(hand) + recompute_fields(hand)
    if hand.best.precision == "fp32":
        made.append(Field("params_dtype", Code("torch.float32"), hand.origin("precision")))
        made.append(Field("bf16", False, hand.origin("precision")))
    known = {"MLAModelProvider": "MLA", "HybridModelProvider": "hybrid"}.get(provider_of(anatomy))
    if known == "hybrid":
        for field in made:
            if field.name.startswith(("rope_scaling", "yarn_")) or field.value == "yarn":
                refusals.no(field.origin, field.value, "turns the positions of hybrid models without scaling")
    return Call(provider_of(anatomy), tuple(made))


def _train(hand: Hand, training: Training) -> Call:
    return Call(
        "TrainingConfig",
        (
            Field("train_iters", training.train.steps, training.origin("train.steps")),
            Field("global_batch_size", hand.best.global_batch, hand.origin("global_batch")),
            Field("micro_batch_size", hand.best.micro_batch, hand.origin("micro_batch")),
            Field("exit_signal_handler", True, "zoo export: SIGTERM saves and leaves"),
        ),
    )


def _validation(training: Training) -> Call:
    every = training.train.eval_every or training.train.steps
    return Call(
        "ValidationConfig",
        (
            Field("eval_interval", every, training.origin("train.eval_every")),
            Field("eval_iters", 32, "zoo export"),
        ),
    )


def _optimizer(hand: Hand, training: Training) -> Call:
    adamw, wide = training.optimizer, hand.best.precision == "fp32"
    return Call(
        "OptimizerConfig",
        (
            Field("optimizer", "adam", f"{hand.origin('optimizer')}: decoupled weight decay"),
            Field("lr", adamw.lr, training.origin("optimizer.lr")),
            Field("min_lr", training.min_lr, training.origin("schedule.min_ratio")),
            Field("weight_decay", adamw.weight_decay, training.origin("optimizer.weight_decay")),
            Field("adam_beta1", adamw.betas[0], training.origin("optimizer.betas")),
            Field("adam_beta2", adamw.betas[1], training.origin("optimizer.betas")),
            Field("adam_eps", adamw.eps, training.origin("optimizer.eps")),
            Field("clip_grad", training.train.clip_norm or 0.0, training.origin("train.clip_norm")),
            Field("bf16", not wide, hand.origin("precision")),
            Field("use_distributed_optimizer", True, "plan: states are shared along dp and cp"),
        ),
    )


def _scheduler(training: Training) -> Call:
    decay = training.optimizer.weight_decay
    made = [
        Field("lr_decay_style", DECAYS[training.schedule.type], training.origin("schedule")),
        Field("lr_warmup_iters", training.warmup, training.origin("schedule.warmup")),
        Field("lr_decay_iters", training.train.steps, training.origin("train.steps")),
        Field("start_weight_decay", decay, training.origin("optimizer.weight_decay")),
        Field("end_weight_decay", decay, training.origin("optimizer.weight_decay")),
        Field("weight_decay_incr_style", "constant", training.origin("optimizer.weight_decay")),
    ]
    if training.schedule.type == "wsd":
        made.append(Field("lr_wsd_decay_style", "linear", "zoo: a straight line"))
        made.append(Field("lr_wsd_decay_iters", training.decay, training.origin("schedule.decay")))
    return Call("SchedulerConfig", tuple(made))


def _dataset(hand: Hand, training: Training) -> Call:
    return Call(
        "MockGPTDatasetConfig",
        (
            Field("seq_length", hand.best.seq_len, hand.origin("seq_len")),
            Field("random_seed", training.train.seed, training.origin("train.seed")),
            Field("reset_position_ids", False, "zoo export: sequences are whole"),
            Field("reset_attention_mask", False, "zoo export: sequences are whole"),
            Field("eod_mask_loss", False, "zoo export: every token counts"),
            Field("dataloader_type", "single", "zoo export"),
        ),
    )


def _tokenizer(hand: Hand) -> Call:
    return Call(
        "TokenizerConfig",
        (
            Field("tokenizer_type", "NullTokenizer", "zoo export: a stand-in"),
            Field("vocab_size", hand.question.spec.vocab_size, "model.vocab_size"),
        ),
    )


def _checkpoint(hand: Hand) -> Call:
    layout = "fsdp_dtensor" if hand.layout.shard > 1 else "torch_dist"
    return Call(
        "CheckpointConfig",
        (
            Field("save", "checkpoints", "zoo export"),
            Field("load", "checkpoints", "zoo export: who is started again goes on"),
            Field("save_interval", 500, "zoo export"),
            Field("ckpt_format", layout, f"{hand.origin('shard')}: shard={hand.layout.shard}"),
            Field("fully_parallel_save", True, "zoo export"),
        ),
    )
