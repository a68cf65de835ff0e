"""The loader takes less than 2% of a training step of 50 ms, from shards on disk and from mixtures of them."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.harness import Row
from zoo.data.batches import Batches
from zoo.data.documents import START
from zoo.data.packing import packed
from zoo.data.shards import Extent, Facts, Shard, open_shard, write_shard
from zoo.data.stream import Piece, Stream

STEP_S, BAR = 0.05, 0.02
NUM_SHARDS, SHARD_TOKENS = 8, 2**24
STEPS = 200


def rows() -> list[Row]:
    """Seconds of a batch; the ratio is 2% of the step over ours."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Stream([write(Path(folder) / f"{index}.safetensors")]) for index in range(NUM_SHARDS)]
        parts = {f"source {index}": (stream, index + 1.0) for index, stream in enumerate(streams)}
        del streams
        found = []
        for batch_size, seq_len in ((8, 512), (8, 2048), (4, 8192)):
            plain = Stream.joined({"": (Stream.joined(parts, None), 1.0)}, None)
            mixed = Stream.joined(parts, None)
            for what, stream in (("one source", plain), (f"{NUM_SHARDS} sources", mixed)):
                batches = Batches(stream, batch_size=batch_size, seq_len=seq_len, seed=0)
                found.append(row(f"{what}, {batch_size} rows of {seq_len}, packed", batches))
        return found


def row(what: str, batches: Batches) -> Row:
    seconds = []
    for step in range(STEPS):
        start = time.perf_counter()
        inputs, _ = batches.batch(step)
        packed(inputs, 0)
        seconds.append(time.perf_counter() - start)
    usual, slowest = fmean(seconds), max(seconds)
    note = f"mean of {STEPS} steps; the slowest {1000 * slowest:.2f} ms"
    limit = STEP_S * BAR
    return Row(what, f"{1000 * usual:.2f} ms a batch", f"bar {1000 * limit:.0f} ms", limit / usual, note)


def write(path: Path) -> Piece:
    """A shard of random tokens in documents of some 1,000."""
    tokens = np.random.default_rng(0).integers(0, 1000, size=SHARD_TOKENS).astype(np.uint16)
    extent = Extent(num_targets=SHARD_TOKENS)
    facts = Facts("", START, START, True, False, {"train": extent, "heldout": Extent()})
    write_shard(path, Shard(facts, {"train": Piece(tokens), "heldout": Piece(tokens[:0])}))
    return open_shard(path).pieces["train"]
