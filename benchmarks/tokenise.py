"""Reading, splitting, tokenizing and writing shards takes no longer than the tokenizers library's own batch call."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import tokenizers

from benchmarks.harness import Row, interleaved
from zoo.data.corpus import load_corpus
from zoo.data.documents import find_sources
from zoo.spec.data import FilesData, FileTokenizer, StdlibData

SEPARATOR = "<|endoftext|>"
NUM_BYTES = 5_000_000


def rows() -> list[Row]:
    """Both sides with the same threads; the ratio is our speed over `encode_batch`, which is handed text in memory."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts = library_texts()
        train_tokenizer(texts, root / "tokenizer.json")
        (root / "texts").mkdir()
        for number, text in enumerate(texts):
            (root / "texts" / f"{number:04d}.txt").write_text(text, encoding="utf-8")
        lines = [json.dumps({"text": piece}) for text in texts for piece in text.split("\n\n") if piece]
        (root / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return [
            row(root, f"{len(texts)} files", "texts", texts),
            row(root, f"{len(lines):,} lines", "lines.jsonl", pieces(lines)),
        ]


def row(root: Path, what: str, name: str, texts: list[str]) -> Row:
    spec = FileTokenizer(path=str(root / "tokenizer.json"), separator=SEPARATOR)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(FilesData(paths=(str(root / name),)), spec, root / "cache"),
        # Opened anew as ours is: the library remembers the words that it has met.
        "theirs": lambda: tokenizers.Tokenizer.from_file(spec.path).encode_batch(texts, add_special_tokens=False),
    }
    seconds = interleaved(calls, rounds=5, warmup=1)
    speeds = {side: f"{megabytes / seconds[side]:.2f} MB/s" for side in calls}
    return Row(
        f"{megabytes:.1f} MB in {what} to checksummed shards",
        speeds["ours"],
        f"encode_batch {speeds['theirs']}",
        seconds["theirs"] / seconds["ours"],
        "bar 0.90",
    )


def ours(data: FilesData, tokenizer: FileTokenizer, cache: Path) -> None:
    """From files to a corpus, nothing of it kept from an earlier call."""
    shutil.rmtree(cache, ignore_errors=True)
    load_corpus(data, tokenizer, cache)


def library_texts() -> list[str]:
    """Some files of Python's standard library."""
    texts: list[str] = []
    for source in find_sources(StdlibData()):
        texts.append(source.path.read_text(encoding="utf-8"))
        if sum(map(len, texts)) > NUM_BYTES:
            break
    return texts


def pieces(lines: list[str]) -> list[str]:
    """The texts of JSON lines."""
    return [json.loads(line)["text"] for line in lines]


def train_tokenizer(texts: list[str], path: Path) -> None:
    """A byte-level BPE tokenizer of 8,000 tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=[SEPARATOR],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[::4], trainer)
    tokenizer.save(str(path))
