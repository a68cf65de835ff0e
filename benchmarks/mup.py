"""With model.init.width_base the best learning rate of a narrow model is that of a wide one.

`make bench ARGS=mup` trains small dense models of four widths at six or seven learning rates, by AdamW with and without
the transfer and by Muon with it, and draws the losses (benchmarks/mup.png). Long: about 15 minutes on 2 cores.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import Row
from zoo.config import compose
from zoo.data.batches import Batches, heldout_windows
from zoo.data.corpus import Corpus, load_corpus
from zoo.decoder import build
from zoo.spec.run import RunSpec, decode_run
from zoo.train.optim import build_optimizers, set_lr
from zoo.train.schedule import lr_ratio
from zoo.train.trainer import clip_gradients

WIDTHS = (64, 128, 256, 512)
BASE = 64
RATES = tuple(2.0**power for power in range(-10, -3))
STEPS, ROWS, LENGTH = 60, 16, 64
PICTURE = Path(__file__).parent / "mup.png"
CASES = {
    "adamw, with the transfer": ("adamw", True),
    "muon, with the transfer": ("muon", True),
    "adamw, without": ("adamw", False),
}


def run_of(width: int, optimizer: str, transfer: bool, rate: float) -> RunSpec:
    words = ["sweep=lr_width", f"sweep/width=w{width}", "model.layers='2*dense'", f"optimizer={optimizer}"]
    words += [f"optimizer.lr={rate}", f"train.steps={STEPS}", f"train.batch_size={ROWS}", f"train.seq_len={LENGTH}"]
    return decode_run(compose([*words, *([f"model.init.width_base={BASE}"] if transfer else [])]))


def loss_of(run: RunSpec, corpus: Corpus) -> float:
    """Held-out loss, nats a token, after the run."""
    torch.manual_seed(run.train.seed)
    model = build(run.model)
    optimizers = build_optimizers(model, run.optimizer, run.model.width_ratio)
    batches = Batches(corpus.train, batch_size=ROWS, seq_len=LENGTH, seed=run.train.seed)
    for step in range(STEPS):
        set_lr(optimizers, lr_ratio(run.schedule, step, STEPS))
        model.loss(*batches.batch(step)).total.backward()
        clip_gradients(model.parameters(), run.train.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        loss = float(model.loss(*heldout_windows(corpus.heldout, LENGTH, 16_384)).items["cross_entropy"])
    return loss if math.isfinite(loss) else math.inf


def losses_of(name: str, runs: dict[int, list[RunSpec]], corpus: Corpus) -> dict[int, list[float]]:
    found = {}
    for width, row in runs.items():
        found[width] = [loss_of(run, corpus) for run in row]
        shown = " ".join(f"{loss:.3f}" for loss in found[width])
        print(f"{name}, width {width}: {shown}", file=sys.stderr, flush=True)
    return found


def moved(losses: dict[int, list[float]]) -> int:
    """Grid steps between the best rates of the widths that differ most."""
    best = [min(range(len(RATES)), key=row.__getitem__) for row in losses.values()]
    return max(best) - min(best)


def draw(found: dict[str, dict[int, list[float]]]) -> None:
    from zoo.plan.pictures import PALETTE, figure_of

    figure = figure_of(4.2 * len(found), 4.2, "held-out loss over the learning rate, by width")
    for axes, (name, losses) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for colour, (width, row) in zip(PALETTE, losses.items(), strict=False):
            axes.plot(RATES, row, "o-", color=colour, label=str(width), markersize=3)
            axes.plot(RATES[row.index(min(row))], min(row), "*", color=colour, markersize=13)
        axes.set_title(name, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("learning rate")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("nats a token")
    figure.axes[0].set_ylim(top=min(4.0, figure.axes[0].get_ylim()[1]))
    figure.axes[0].legend(title="d_model", frameon=False)
    figure.savefig(PICTURE, dpi=150)


def rows(names: Sequence[str] = tuple(CASES)) -> list[Row]:
    """How far the best rate moves from width 64 to 512, in steps of a grid of factor 2; the bar is one."""
    torch.set_num_threads(os.cpu_count() or 1)
    run = run_of(BASE, "adamw", True, RATES[0])
    corpus = load_corpus(run.data, run.tokenizer, None)
    runs = {name: {width: [run_of(width, *CASES[name], rate) for rate in RATES] for width in WIDTHS} for name in names}
    found = {name: losses_of(name, runs[name], corpus) for name in names}
    draw(found)
    return [
        Row(
            f"{name}: the best rate from width {WIDTHS[0]} to {WIDTHS[-1]}",
            f"moves {moved(losses)} grid steps",
            "bar 1 step" if CASES[name][1] else "no bar",
            1 / max(1, moved(losses)),
        )
        for name, losses in found.items()
    ]
