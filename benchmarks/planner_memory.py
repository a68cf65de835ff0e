"""Peaks of memory that Megatron-LM's own tests measured, beside the planner's.

`python -m benchmarks.planner_memory TABLE` writes benchmarks/data/memory_rows.csv from reference/memory_megatron.csv.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row
from zoo.plan.layout import Layout, Points
from zoo.plan.memory import GIB, Storage, memory_of, total
from zoo.spec.base import decode
from zoo.spec.model import ModelSpec

ROWS = Path(__file__).parent / "data" / "memory_rows.csv"
COLUMNS = ("test", "environment", "platform", "num_gpus", "peak_bytes", "arguments", "source")
KEPT = (
    "num-layers hidden-size ffn-hidden-size num-attention-heads group-query-attention num-query-groups kv-channels "
    "num-experts moe-ffn-hidden-size moe-router-topk moe-shared-expert-intermediate-size moe-layer-freq swiglu "
    "untie-embeddings-and-output-weights vocab-size position-embedding-type max-position-embeddings seq-length "
    "micro-batch-size global-batch-size tensor-model-parallel-size pipeline-model-parallel-size "
    "num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank context-parallel-size "
    "expert-model-parallel-size expert-tensor-parallel-size sequence-parallel use-distributed-optimizer "
    "transformer-impl attention-backend hidden-dropout attention-dropout recompute-granularity optimizer fp16 "
    "disable-bias-linear cross-entropy-loss-fusion"
).split()
SKIPPED = (
    "hybrid-layer-pattern multi-latent-attention mtp-num-layers use-megatron-fsdp fp8-format recompute-modules "
    "perform-rl-step"
).split()


@dataclass(frozen=True)
class Measured:
    """One test."""

    name: str
    num_gpus: int
    peak_gib: float
    a: dict[str, Any]
    """Megatron-LM's own arguments."""


def read(table: str) -> list[dict[str, Any]]:
    """The tests of decoders whose arguments say everything: no recipes in code, no hybrids, one row a test."""
    found: dict[str, dict[str, Any]] = {}
    with open(table, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            a = json.loads(row["all_model_args_json"])
            wanted = row["model_dir"] in ("gpt", "moe", "mixtral", "nemotron") and row["num_gpus"]
            if not wanted or not row["mem_max_allocated_bytes_peak"] or any(name in a for name in SKIPPED):
                continue
            if any(name not in a for name in ("num-layers", "seq-length", "hidden-size")) or "spec" in a:
                continue
            values = [row["test_case"], row["environment"], row["platform"], row["num_gpus"]]
            values += [
                row["mem_max_allocated_bytes_peak"],
                json.dumps({k: a[k] for k in KEPT if k in a}),
                row["source"],
            ]
            found[row["test_case"] + row["platform"]] = dict(zip(COLUMNS, values, strict=True))
    return list(found.values())


def measured() -> list[Measured]:
    with ROWS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        Measured(row["test"], int(row["num_gpus"]), float(row["peak_bytes"]) / GIB, json.loads(row["arguments"]))
        for row in rows
    ]


def spec_of(a: dict[str, Any]) -> ModelSpec:
    """The model that the arguments describe; defaults are Megatron-LM's."""
    d_model, heads = a["hidden-size"], a["num-attention-heads"]
    gated, experts = bool(a.get("swiglu")), a.get("num-experts") or 0
    tp = a.get("tensor-model-parallel-size", 1)
    vocab = -(-a.get("vocab-size", 50257) // (128 * tp)) * 128 * tp
    d_ffn = a.get("ffn-hidden-size") or (int(4 * d_model * 2 / 3 / 64) * 64 if gated else 4 * d_model)
    activation = {"activation": "silu" if gated else "gelu", "gated": gated}
    learned = a.get("position-embedding-type", "learned_absolute") == "learned_absolute"
    description: dict[str, Any] = {
        "d_model": d_model,
        "vocab_size": vocab,
        "attention": {
            "type": "gqa",
            "num_heads": heads,
            "num_kv_heads": a.get("num-query-groups", heads) if a.get("group-query-attention") else heads,
            "head_dim": a.get("kv-channels") or d_model // heads,
        },
        "kinds": {"dense": {"mixer": "attention", "ffn": "mlp"}},
        "mlp": {"type": "mlp", "d_ffn": d_ffn, **activation},
        "layers": f"{a['num-layers']}*dense",
        "embedding": {"positions": a["max-position-embeddings"] if learned else None},
        "head": {"tied": not a.get("untie-embeddings-and-output-weights")},
    }
    if experts:
        shared = a.get("moe-shared-expert-intermediate-size")
        moe = {"num_experts": experts, "top_k": a.get("moe-router-topk", 2)}
        moe |= {"d_expert": a.get("moe-ffn-hidden-size") or d_ffn, **activation}
        moe |= {"num_shared_experts": 1, "d_shared_expert": shared} if shared else {}
        description |= {"moe": {"type": "moe", **moe}, "kinds": {"dense": {"mixer": "attention", "ffn": "moe"}}}
        del description["mlp"]
    return decode(ModelSpec, description)


def predicted(test: Measured) -> float:
    """GiB of the last stage, where Megatron-LM reports."""
    a, name = test.a, "model-parallel-size"
    tp, pp = a.get(f"tensor-{name}", 1), a.get(f"pipeline-{name}", 1)
    cp, ep = a.get("context-parallel-size", 1), a.get(f"expert-{name}", 1)
    per_piece = a.get("num-layers-per-virtual-pipeline-stage")
    vp = a.get("num-virtual-stages-per-pipeline-rank") or (a["num-layers"] // pp // per_piece if per_piece else 1)
    etp = a.get("expert-tensor-parallel-size") or (tp if a.get("num-experts") else 1)
    dp = max(1, test.num_gpus // (tp * pp * cp))
    layout = Layout(tp, pp, vp, cp, ep, etp, dp)
    recompute = {"full": "full", "selective": "selective"}.get(a.get("recompute-granularity", ""), "none")
    batches = {"global_batch": a["global-batch-size"], "micro_batch": a["micro-batch-size"]}
    points = Points.of([layout], seq_len=a["seq-length"], recompute=recompute, **batches)
    fused = a.get("transformer-impl", "transformer_engine") != "local" and a.get("attention-backend") != "unfused"
    storage = Storage(
        spread_states=bool(a.get("use-distributed-optimizer")),
        fused_attention=fused,
        dropout=a.get("hidden-dropout", 0.1) > 0,
        sequence_parallel=bool(a.get("sequence-parallel")),
        logit=LOGIT,
    )
    return float(total(memory_of(spec_of(a), points, storage, stage="last"))[0])


LOGIT = 8.0


def errors() -> list[tuple[Measured, float]]:
    """Every test with the planner's GiB."""
    return [(test, predicted(test)) for test in measured()]


def rows() -> list[Row]:
    found = errors()
    relative = np.array([abs(ours / test.peak_gib - 1) for test, ours in found])
    median, p90 = float(np.median(relative)), float(np.quantile(relative, 0.9))
    return [
        Row(f"median error of peak memory, {len(found)} Megatron-LM tests", f"{median:.1%}", "bar 10%", 0.10 / median),
        Row("90th percentile", f"{p90:.1%}", "no bar", 1.0),
    ]


def main(table: str) -> None:
    with ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(read(table))


if __name__ == "__main__":
    main(sys.argv[1])
