"""Published runs read as layouts: what sources leave out is filled in by what their software does.

`python -m benchmarks.planner_read TABLE` writes benchmarks/data/planner_rows.csv from a table of published runs
(reference/throughput.csv).
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace

from benchmarks.planner_rows import ROWS, Run, machine, model_of
from zoo.plan import price as planned
from zoo.plan.engine import PRECISIONS, engine_of
from zoo.plan.flops import count_flops
from zoo.plan.layout import Points
from zoo.plan.price import price
from zoo.plan.products import Product, uses_of
from zoo.spec.model import ModelSpec

MACHINES = {
    "A100_SXM_80GB": "a100_8x",
    "A100_SXM_40GB": "a100_40_8x",
    "H100_SXM_80GB": "h100_8x",
    "H100_SXM_96GB_HBM2e_500W": "h100_96_8x",
    "H200_SXM_141GB": "h200_8x",
    "H800_SXM_80GB": "h800_8x",
    "B200_SXM": "b200_8x",
    "B300_SXM": "b300_8x",
    "GB200_NVL72": "gb200_nvl72",
    "GB300_NVL72": "gb300_nvl72",
    "MI300X": "mi300x_8x",
    "MI325X": "mi325x_8x",
    "MI350X": "mi350x_8x",
    "MI355X": "mi355x_8x",
    "TPU_v5e": "tpu_v5e",
    "TPU_v5p": "tpu_v5p",
    "TPU_v6e_Trillium": "tpu_v6e",
    "TPU_v7x_Ironwood (per chip, 2 cores)": "tpu_v7",
}

SOFTWARE = (  # the first pattern that is found in the name of a software decides: engine, epoch
    (r"Megatron-DeepSpeed", "megatron", "deepspeed"),
    (r"Megatron-LM v2|2205\.05198", "megatron", "2022"),
    (r"SimuMax|23e00ed0", "megatron", "core_0.14"),
    (r"Primus", "megatron", "primus"),
    (r"AutoModel", "fsdp", "automodel"),
    (r"26\.06|26\.08|2026-07", "megatron", "26.06"),
    (r"26\.04|2026-05", "megatron", "26.04"),
    (r"26\.02", "megatron", "26.02"),
    (r"600d069b|Megatron-Core v0\.15", "megatron", "dev"),  # step by step, untuned
    (r"25\.11|PR #3107", "megatron", "25.11"),
    (r"Bridge NeMo container 25\.09|Megatron-Core dev", "megatron", "25.09"),
    (r"MaxText \(JAX\)|MaxText 2024|GKE", "maxtext", "gpu"),
    (r"PaxML", "maxtext", "paxml"),
    (r"MaxText", "maxtext", "tpu"),
    (r"llm-foundry|fms-fsdp", "fsdp", "2023"),
    (r"InternEvo", "fsdp", "internevo"),
    (r"torchtitan 2024|2024-12", "fsdp", "2024"),
    (r"torchtitan|Kempner|OLMo", "fsdp", "2025"),
    (r"Launcher|NeMo 2\.|r0\.8|v0\.9|NeMo 24\.09", "megatron", "24.09"),
    (r"NeMo 24\.12|NeMo \(dgxc|NeMo 25\.0|examples/llama|CI golden", "megatron", "25.04"),
)

NETWORKS = {  # Gbit/s of a device: what sources say of their clusters
    "Megatron-DeepSpeed": 50,  # Jean Zay: four 100 Gbit/s adapters for eight devices
    "InternEvo": 50,  # 4x100 Gbit/s RoCE for eight devices
}

RECOMPUTE = (
    (r"every|AC selective op|per-op|selective AC", "selective_op"),
    (r"AC selective layer", "selective_op"),
    (r"^selective:", ""),
    (r"layers=|5 layers|offload", "none"),
    (r"selective", "selective"),
    (r"full", "full"),
)


DEEPSPEED_ROUNDS = (("2022-02-25", "deepspeed_0220"), ("2022-02-28", "deepspeed_0225"))
"""Runs of Megatron-DeepSpeed before a day, and their epoch. From February 25th on the same layouts took 4 to 7% less
time (T1097, T1114 and T1127; T1093 and T1130; T1092 and T1132; T1119 and T1161; T1121 and T1155). From the 28th on they
took 4 bytes more for each parameter of a device (T1149 and T1187; T1172 and T1174): gradients in fp32."""


def release_of(row: dict[str, str]) -> tuple[str, str] | None:
    """The engine and the epoch of a row; None if its software is none of SOFTWARE."""
    software = row["software+version"]
    found = next(((engine, epoch) for pattern, engine, epoch in SOFTWARE if re.search(pattern, software)), None)
    if found == ("megatron", "deepspeed"):
        epoch = next((epoch for day, epoch in DEEPSPEED_ROUNDS if row["date"] < day), "deepspeed")
        return "megatron", epoch
    return found


def read(row: dict[str, str]) -> Run | None:
    """A row of the table as a run; None when it is no pretraining or leaves out too much."""
    software, found = row["software+version"], release_of(row)
    name = shaped(row)
    spec = model_of(name)
    if row["quality"] not in ("published", "derived") or row["kind"] != "pretrain" or "MLPerf" in row["notes"]:
        return None
    if found is None or spec is None or row["hardware"] not in MACHINES or not row["seq_len"] or not row["num_gpus"]:
        return None
    if not can_run(MACHINES[row["hardware"]], precision_of(row["precision"])):
        return None
    if re.search(r"NHIDDEN=14400|NHIDDEN=13824 NLAYERS=78 NHEADS=128", row["notes"]):  # heads that fill no tiles
        return None
    engine, epoch = found
    degrees = {name: int(row[name] or 1) for name in ("tp", "pp", "vp", "cp", "ep")}
    if split := re.search(r"tp=(\d+) pp=(\d+)\)", row["notes"]):
        degrees["tp"], degrees["pp"] = int(split[1]), int(split[2])
    devices = int(row["num_gpus"])
    dp, rest = divmod(devices, degrees["tp"] * degrees["pp"] * degrees["cp"])
    moe = any(use.grouped for use in products(spec))
    unknown = engine == "megatron" and (not row["micro_batch"] or not (row["tp"] or split))
    if rest or unknown or contradicts(row, spec):
        return None
    if engine == "maxtext" and moe:
        degrees["ep"] = min(devices, 8)
    etp = int(row["etp"] or (degrees["tp"] if "Grok" in row["model"] else 1))
    micro = int(row["micro_batch"] or 1)
    if not row["micro_batch"] and engine == "maxtext" and row["global_batch"]:
        micro = max(1, round(int(row["global_batch"]) / devices))
    batch = int(row["global_batch"] or 0)
    mtp = int(spec.mtp is not None and engine == "megatron" and not re.search("no MTP|without MTP", row["notes"]))
    tokens = speed(row, spec, bool(mtp))
    if not batch or not tokens:
        return None
    if batch % (micro * dp):
        batch = max(1, round(batch / (micro * dp))) * micro * dp
    run = Run(
        row_id=row["row_id"],
        model=name,
        hardware=MACHINES[row["hardware"]],
        domain=4 if "Kempner" in software else 0,
        network_gbit_s=next((rate for name, rate in NETWORKS.items() if name in software), 0),
        seq_len=int(row["seq_len"]),
        global_batch=batch,
        micro_batch=micro,
        precision=precision_of(row["precision"]),
        **degrees,
        etp=etp,
        dp=dp,
        shard=shard_of(row["dp_or_fsdp"], dp, degrees["cp"], engine),
        recompute=recompute_of(row["recompute/offload"]),
        graphs=graphs_of(row["cuda_graphs"], row["software+version"]),
        engine=engine,
        epoch=epoch,
        mtp=mtp,
        balanced=int("real" not in row["moe_routing"] and "learned" not in row["moe_routing"]),
        tokens_per_s=tokens,
        memory_gb=float(row["peak_memory_gb_if_published"] or 0),
        source=row["source"],
    )
    # fms-fsdp recomputes whole blocks, and does not say how many of them.
    stated = row["recompute/offload"] and "fms-fsdp" not in software
    return run if stated or fits(run) else replace(run, recompute="full")


def shaped(row: dict[str, str]) -> str:
    """The name of a row's model, with its shape where the notes give one beside a name that stands for several."""
    found = re.search(r"NHIDDEN=(\d+) NLAYERS=(\d+) NHEADS=(\d+)", row["notes"])
    if not found or "proto" not in row["model"]:
        return row["model"]
    width = 12288 if found[2] in ("100", "106") else int(found[1])  # as its size and FLOP/s say
    return f"{row['model']}@{width}x{found[2]}x{found[3]}"


def fits(run: Run) -> bool:
    """Whether a run has room as it is described."""
    spec, hardware = model_of(run.model), machine(run.hardware)
    assert spec is not None
    batches = {"global_batch": run.global_batch, "micro_batch": run.micro_batch}
    points = Points.of([run.layout], seq_len=run.seq_len, recompute=run.recompute, **batches)
    engine = engine_of(run.engine)
    return bool(price(spec, hardware, points, planned.Run(run.precision, mtp=bool(run.mtp)), engine).fits[0])


def can_run(name: str, precision: str) -> bool:
    """Whether a chip has a peak for a precision."""
    return getattr(machine(name).chip.tflops, PRECISIONS[precision][0]) is not None


def products(spec: ModelSpec) -> Iterator[Product]:
    """All matrix products of a model's blocks."""
    return (product for use in uses_of(spec, False) for product in use.products)


def speed(row: dict[str, str], spec: ModelSpec, mtp: bool) -> float:
    """Tokens per second of one device, from FLOP/s by the source's convention where it gives no more; 0: unknown."""
    if row["tokens_per_s_per_gpu"]:
        return float(row["tokens_per_s_per_gpu"])
    hardware, model = row["hw_tflops_per_gpu"], row["model_tflops_per_gpu"]
    half = "causal-half" in row["flops_convention"] or "causal half" in row["flops_convention"]
    count = count_flops(spec, int(row["seq_len"]), skip_masked=half)
    if mtp and spec.mtp is not None:
        opened = spec.replace(mtp=spec.mtp.replace(enabled=True))
        count = count_flops(opened, int(row["seq_len"]), skip_masked=half)
    if hardware and "full" in row["recompute/offload"]:
        return float(hardware) * 1e12 / (4 * count.total - count.by_block["head"])
    return float(model) * 1e12 / count.training if model else 0.0


def precision_of(text: str) -> str:
    """The zoo's name of a published precision."""
    for name in ("nvfp4", "mxfp8", "int8"):
        if name in text:
            return name
    return "fp8" if "fp8" in text else "bf16"


def recompute_of(text: str) -> str:
    """The zoo's name of a published recompute setting."""
    if text.startswith("selective:"):
        known = ("core_attn", "mla_up_proj", "up_proj", "moe_act", "act", "layernorm", "norm", "mlp", "moe")
        kept = [part for part in re.split(r"[,:;]", text)[1:] if part in known]
        return "selective:" + ",".join(kept) if kept else "none"
    if layers := re.fullmatch(r"cpu_offload_layers=(\d+)", text):
        return f"offload:{layers[1]}"
    return next((name for pattern, name in RECOMPUTE if name and re.search(pattern, text)), "none")


def graphs_of(text: str, software: str) -> int:
    """What is captured; where that is not said, layers are by releases that can."""
    if not text:
        return int("Bridge NeMo container" in software)
    return 2 if text == "full_iteration" else 0 if text.startswith("none") else 1


def contradicts(row: dict[str, str], spec: ModelSpec) -> bool:
    """Whether tokens per second and FLOP/s of a row cannot both be true."""
    rate = float(row["tokens_per_s_per_gpu"] or 0)
    flops = float(row["hw_tflops_per_gpu"] or row["model_tflops_per_gpu"] or 0) * 1e12
    if not rate or not flops:
        return False
    expected = count_flops(spec, int(row["seq_len"])).training * (4 / 3 if row["hw_tflops_per_gpu"] else 1)
    return not 0.65 < flops / rate / expected < 1.5


def shard_of(text: str, dp: int, cp: int, engine: str) -> int:
    """The group that shares weights: replicas, and with them the devices that share a sequence."""
    if engine == "megatron" and not re.search(r"FSDP(\d| DP)", text):
        return 1
    if engine == "fsdp" and "zero" in text.lower():
        return 1
    sizes = re.search(r"FSDP2?[ =/]?(\d+)", text.replace("(<=", ""))
    size = int(sizes[1]) * cp if sizes and int(sizes[1]) > 1 else 256 if "256" in text or "+DP" in text else dp * cp
    size = min(size, dp * cp)
    return size if dp * cp % size == 0 else dp * cp


def main(table: str) -> None:
    with open(table, encoding="utf-8", newline="") as file:
        found = [read(row) for row in csv.DictReader(file)]
    with ROWS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Run)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(run) for run in found if run is not None)
    print(f"{sum(run is not None for run in found)} of {len(found)} rows written to {ROWS}")


if __name__ == "__main__":
    main(sys.argv[1])
