"""500 damaged files of every kind that zoo reads: one clear error each, nothing hung, huge or executed.

`make bench ARGS=fuzz`. A file whose damage does not show, such as another bit in a weight without a checksum, is read.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

import zoo
from benchmarks.corruptions import Outcome, Target, run_cases
from benchmarks.harness import Row
from tests.train.runs import small_run
from zoo.config import compose, load
from zoo.data.batches import Batches
from zoo.data.corpus import load_corpus
from zoo.registry import register
from zoo.spec.base import decode
from zoo.spec.data import FilesData, FileTokenizer
from zoo.spec.run import decode_run
from zoo.train.loop import train
from zoo.train.metrics_file import METRICS, MetricsFile

CASES = 500
TEXT = "def words(self):\n    return 'a text to be learned, line by line'\n" * 60
TINY = ("model.d_model=32", "model.layers='2*sparse'", "model.moe.d_expert=32")


def _config(folder: Path) -> None:
    (folder / "conf" / "model").mkdir(parents=True)
    model = Path(zoo.__file__).parents[1] / "conf" / "model" / "tiny_moe.yaml"
    (folder / "conf" / "model" / "mine.yaml").write_bytes(model.read_bytes())


def _use_config(folder: Path) -> object:
    register(configs=str(folder / "conf"))
    return zoo.build(load("mine"), device="meta"), load("mine").params(), decode_run(compose(["model=mine"]))


def _overrides(folder: Path) -> None:
    words = ["model=tiny_moe", "model.moe.num_experts=16", "optimizer.lr=1e-3", "train.steps=20", "data.seed=3"]
    (folder / "words.txt").write_text("\n".join([*words, "schedule.warmup=0.1", "parallel=manual", "kernels=cpu"]))


def _use_overrides(folder: Path) -> object:
    words = (folder / "words.txt").read_bytes().decode(errors="surrogateescape").splitlines()
    from zoo.train.run import checked

    return checked([word for word in words if not word.startswith("-")])


def _checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    zoo.save_pretrained(zoo.build(zoo.shrink(load("qwen3_30b_a3b"))), folder)
    _tokenizer(folder)


def _tokenizer(folder: Path) -> None:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([TEXT], trainer)
    made.save(str(folder / "tokenizer.json"))


def _use_checkpoint(folder: Path) -> object:
    return zoo.from_pretrained(folder)(torch.tensor([[1, 2, 3]]))


def _use_tokenizer(folder: Path) -> object:
    from zoo.hf.source import open_checkpoint
    from zoo.hf.tokenizer import text_of

    text = text_of(open_checkpoint(folder))
    return text.decode(text.encode("def words"))


def _text(folder: Path) -> None:
    lines = [f'{{"text": "line {number} of a text to be learned"}}' for number in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    _tokenizer(folder)


def _load_text(folder: Path) -> object:
    data = decode(FilesData, {"paths": [str(folder / "text.jsonl")]}, "data")
    tokenizer = FileTokenizer(path=str(folder / "tokenizer.json"), separator="<|endoftext|>")
    corpus = load_corpus(data, tokenizer, folder / "cache")
    return Batches(corpus.train, batch_size=2, seq_len=8, seed=0).batch(3)


def _shards(folder: Path) -> None:
    _text(folder)
    _load_text(folder)


def _run(folder: Path) -> None:
    reporter = MetricsFile(folder / "run" / METRICS)
    train(small_run(folder, "train.steps=2", "checkpoint.every=1"), folder / "run", [reporter])
    reporter.close()
    assert load_file(next(folder.rglob("model.safetensors")))


def _resume(folder: Path) -> object:
    return train(small_run(folder, "train.steps=3", "checkpoint.resume=auto"), folder / "run")


def _report(folder: Path) -> object:
    from zoo.cli.report import run

    return run([str(folder)])


TARGETS = (
    Target("model yaml", _config, ("mine.yaml",), _use_config),
    Target("overrides", _overrides, ("words.txt",), _use_overrides),
    Target("config.json", _checkpoint, ("config.json",), _use_checkpoint),
    Target("safetensors", _checkpoint, ("*.safetensors",), _use_checkpoint),
    Target("tokenizer.json", _checkpoint, ("tokenizer.json",), _use_tokenizer),
    Target("jsonl", _text, ("text.jsonl",), _load_text),
    Target("shards", _shards, ("cache/**/*",), _load_text),
    Target("run checkpoint", _run, ("run/checkpoints/**/*",), _resume),
    Target("run records", _run, ("run/metrics.jsonl", "run/config.yaml"), _report),
)


def outcomes(count: int = CASES, first_seed: int = 0) -> list[Outcome]:
    """`count` cases, spread over all targets."""
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        for index, target in enumerate(TARGETS):
            share = count // len(TARGETS) + (index < count % len(TARGETS))
            mine = run_cases(target, share, Path(name), first_seed)
            kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(one.kind for one in mine).items())
            print(f"{target.name}: {kinds}", file=sys.stderr, flush=True)
            found += mine
    return found


def rows() -> list[Row]:
    """Faults among all cases; the ratio is 1 where there is none."""
    torch.set_num_threads(1)
    found = outcomes()
    for one in found:
        if one.fault:
            print(f"{one.kind} {one.target} seed {one.seed}: {one.detail}\n", file=sys.stderr)
    result = []
    for target in TARGETS:
        mine = [one for one in found if one.target == target.name]
        kinds = Counter(one.kind for one in mine)
        faults = sum(one.fault for one in mine)
        said = f"{kinds['error']} clear errors, {kinds['read']} read, {faults} faults"
        result.append(Row(f"{target.name}, {len(mine)} damaged", said, "no fault", float(faults == 0)))
    return result
