"""What grouped products of experts cost, from a table of whole mixtures of experts measured alone.

`python -m benchmarks.fit_kernels TABLE` reads kernel_moe_measured.csv.gz (reference/) and prints for every chip and
dtype what `zoo.plan.kernels.product_seconds` supposes: that the time of permuting, two grouped products, activation
and permuting back is a sum of arithmetic, of bytes moved for each row, and of a start.
"""

from __future__ import annotations

import csv
import gzip
import sys
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

LEAST_ROWS = 256
"""Of an expert: training has no fewer."""
BYTE_S = {"A100": 2.04e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8e12, "B300": 8e12, "GB200": 8e12, "GB300": 8e12}
TERMS = ("arithmetic", "bytes by width in", "bytes by width inside", "weights", "half tiles", "start")
FIRST = (1.3, 10.0, 5.0, 1.0, 1.0, 6e-5)
SPREAD = (1.0, 1.0, 1.0, 0.5, 0.5, 0.7)
NOISE = 0.15

Key = tuple[float, ...]


def read(path: str) -> dict[tuple[str, str], dict[Key, float]]:
    """Seconds by chip and dtype, then by rows, widths, experts and peak: the best over kernels."""
    found: dict[tuple[str, str], dict[Key, float]] = defaultdict(dict)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            chip, inside = row["hardware"].split("_")[0], int(row["inter_size"]) / int(row["moe_tp_size"])
            rows = float(row["tok_per_local_expert"])
            if row["distribution"] != "balanced" or chip not in BYTE_S or rows < LEAST_ROWS or inside < LEAST_ROWS:
                continue
            experts = int(row["num_experts"]) / int(row["moe_ep_size"])
            key = (rows, float(row["hidden_size"]), inside, experts, float(row["dense_peak_tflops_used"]) * 1e12)
            kind, seconds = (chip, row["moe_dtype"]), float(row["latency_ms"]) * 1e-3
            found[kind][key] = min(seconds, found[kind].get(key, np.inf))
    return found


def terms_of(chip: str, dtype: str, keys: np.ndarray) -> np.ndarray:
    """Seconds of every term at a factor of one, [n, terms]."""
    rows, width, inside, experts, peak = keys.T
    byte_s, factor = 0.8 * BYTE_S[chip], 2.0 if dtype == "bfloat16" else 1.0 if "fp8" in dtype else 0.5
    each = 6 * width * inside / peak
    moved = rows * experts / byte_s
    weights = 3 * factor * experts * width * inside / byte_s
    columns = (rows * experts * each, moved * width, moved * inside, weights, 64 * experts * each, np.ones(len(rows)))
    return np.stack(columns, axis=1)


def fitted(terms: np.ndarray, seconds: np.ndarray, rounds: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the terms, and relative errors: least squares of logarithms in which what is far off pulls little."""
    first, spread = np.log(FIRST), np.array(SPREAD)
    logs = first.copy()
    for _ in range(rounds):
        parts = terms * np.exp(logs)
        off, slope = np.log(parts.sum(1) / seconds), parts / parts.sum(1)[:, None]
        weights = 1 / (1 + (off / NOISE) ** 2) / NOISE**2
        left = slope.T @ (slope * weights[:, None]) + np.diag(1 / spread**2)
        logs = logs - np.clip(np.linalg.solve(left, slope.T @ (weights * off) + (logs - first) / spread**2), -0.4, 0.4)
    return np.exp(logs), np.abs(np.expm1(np.log((terms * np.exp(logs)).sum(1) / seconds)))


def show(kind: tuple[str, str], measured: Mapping[Key, float]) -> str:
    factors, errors = fitted(terms_of(*kind, np.array(list(measured))), np.array(list(measured.values())))
    values = ", ".join(f"{name} {value:.3g}" for name, value in zip(TERMS, factors, strict=True))
    return f"{' '.join(kind)} ({len(measured)}): {values}; error {np.median(errors):.0%}"


def main(path: str) -> None:
    for kind, measured in sorted(read(path).items()):
        print(show(kind, measured))


if __name__ == "__main__":
    main(sys.argv[1])
