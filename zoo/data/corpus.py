"""A corpus: documents as two streams of tokens, one to train on and one held out."""

from __future__ import annotations

import array
import hashlib
import platform
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from zoo.data import cache
from zoo.data.documents import Document, Flaw, Source, find_sources, read_documents
from zoo.data.tokenizer import Tokenizer, Tokens, load_tokenizer
from zoo.spec.base import ConfigError
from zoo.spec.data import DataSpec, FilesData, TokenizerSpec

_FLAWS_SHOWN = 5
_BATCH_BYTES = 1 << 22
"""Text that is tokenized in one call."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of a training text and a held-out text, each document followed by the tokenizer's separator.

    `train` and `heldout` are one-dimensional and read-only, of the smallest unsigned type that holds the vocabulary.
    """

    train: Tokens
    heldout: Tokens
    vocab_size: int
    sha256: str
    """Of all tokens and their split: equal hashes, equal corpus."""
    num_train_documents: int
    num_heldout_documents: int
    num_train_bytes: int
    """UTF-8 bytes of the text, and one for each separator."""
    num_heldout_bytes: int
    description: str
    """One line for people."""

    @property
    def train_bytes_per_token(self) -> float:
        """Divide bits per token by this to get bits per byte. Exactly 1 when tokens are bytes."""
        return self.num_train_bytes / len(self.train)

    @property
    def heldout_bytes_per_token(self) -> float:
        """The same for the held-out text."""
        return self.num_heldout_bytes / len(self.heldout)


def load_corpus(data: DataSpec, tokenizer: TokenizerSpec, cache_dir: Path | None = None) -> Corpus:
    """Read, split and tokenize the text that `data` names.

    The result depends on names and contents of the files alone, not on the order in which a directory lists them. A
    document is held out when a hash of it (for the standard library: of its name) falls below `heldout_fraction`, so it
    keeps its side when others come and go. When that leaves a side empty, the end of every document is held out.

    Args:
        cache_dir: Keeps the tokens on disk; a later call with the same settings and unchanged files maps them into
            memory instead of reading the files.

    Raises:
        ConfigError: no text there, or unreadable, or not text (see `FilesData.bad_lines`), or a library is missing.
    """
    sources = find_sources(data)
    place = cache.entry(cache_dir, data, tokenizer, sources) if cache_dir else None
    if place and (stored := cache.read(place)):
        return Corpus(**stored)
    corpus = _build(data, sources, load_tokenizer(tokenizer))
    if place:
        cache.write(place, {field.name: getattr(corpus, field.name) for field in fields(corpus)})
    return corpus


def _build(data: DataSpec, sources: list[Source], tokenizer: Tokenizer) -> Corpus:
    train, heldout, flaws = _fill(data, sources, tokenizer, cut=False)
    cut = not (train.num_documents and heldout.num_documents)
    if cut:
        del train, heldout  # before the same text is read again
        train, heldout, flaws = _fill(data, sources, tokenizer, cut=True)
    if not (train.num_documents and heldout.num_documents):
        raise ConfigError(f"data: found no text in {_count(len(sources), 'file')}{_note(flaws)}; give more text")
    train_tokens, heldout_tokens = train.tokens(), heldout.tokens()
    sha256 = _hash(train_tokens, heldout_tokens)
    return Corpus(
        train=train_tokens,
        heldout=heldout_tokens,
        vocab_size=tokenizer.vocab_size,
        sha256=sha256,
        num_train_documents=train.num_documents,
        num_heldout_documents=heldout.num_documents,
        num_train_bytes=train.num_bytes,
        num_heldout_bytes=heldout.num_bytes,
        description=_describe(data, train, heldout, cut) + f", sha256 {sha256[:12]}" + _note(flaws),
    )


class _Side:
    """One side of the split while it grows; `array.array` because it grows in place."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.num_documents = 0
        self.num_bytes = 0
        self._tokenizer = tokenizer
        self._tokens: array.array[int] = array.array(tokenizer.dtype.char)
        self._pending: list[bytes | memoryview] = []
        self._num_pending = 0

    def add(self, text: bytes | memoryview) -> None:
        self.num_documents += 1
        self.num_bytes += len(text) + 1
        self._pending.append(text)
        self._num_pending += len(text)
        if self._num_pending >= _BATCH_BYTES:
            self._flush()

    def tokens(self) -> Tokens:
        self._flush()
        tokens = np.frombuffer(self._tokens, dtype=self._tokenizer.dtype)
        tokens.flags.writeable = False
        return tokens

    def _flush(self) -> None:
        for part in self._tokenizer.encode_documents(self._pending):
            self._tokens.frombytes(part.view(np.uint8).data)
        self._pending.clear()
        self._num_pending = 0


def _fill(data: DataSpec, sources: list[Source], tokenizer: Tokenizer, cut: bool) -> tuple[_Side, _Side, list[Flaw]]:
    """Training side, held-out side and what was passed over. `cut` divides each document instead of placing it."""
    train, heldout, flaws = _Side(tokenizer), _Side(tokenizer), list[Flaw]()
    for document in read_documents(data, sources):
        if isinstance(document, Flaw):
            flaws.append(document)
            if len(flaws) == _FLAWS_SHOWN:
                _refuse(data, flaws)
        elif cut:
            at = _cut(document.text, data.heldout_fraction)
            for side, part in ((train, memoryview(document.text)[:at]), (heldout, memoryview(document.text)[at:])):
                if part:
                    side.add(part)
        else:
            (heldout if _is_held_out(document, data) else train).add(document.text)
    _refuse(data, flaws)
    return train, heldout, flaws


def _is_held_out(document: Document, data: DataSpec) -> bool:
    digest = hashlib.blake2b(document.key, digest_size=8, key=str(data.seed).encode()).digest()
    return int.from_bytes(digest, "little") < data.heldout_fraction * 2.0**64


def _cut(text: bytes, heldout_fraction: float) -> int:
    """Where the held-out end of a text begins: at a character."""
    at = int(len(text) * (1 - heldout_fraction))
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at


def _refuse(data: DataSpec, flaws: list[Flaw]) -> None:
    """Raise for lines without text, unless the user has said to skip them. The standard library is always skipped."""
    if flaws and isinstance(data, FilesData) and data.bad_lines == "error":
        listed = "".join(f"\n  {flaw.where}: {flaw.reason}" for flaw in flaws)
        more = " (reading stopped there)" if len(flaws) == _FLAWS_SHOWN else ""
        raise ConfigError(
            f"data.paths: found {_count(len(flaws), 'text')} that cannot be used{more}; "
            f"correct or leave out the files, or skip such texts with data.bad_lines=skip{listed}"
        )


def _hash(*sides: Tokens) -> str:
    digest = hashlib.sha256()
    for tokens in sides:
        digest.update(f"{tokens.dtype.itemsize} {len(tokens)}\n".encode())
        digest.update(tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()


def _describe(data: DataSpec, train: _Side, heldout: _Side, cut: bool) -> str:
    if isinstance(data, FilesData):
        name, noun = " ".join(data.paths), "document"
    else:
        name, noun = f"standard library of Python {platform.python_version()}", "file"
    return (
        f"{name}: {train.num_bytes / 1e6:.2f} MB in {_count(train.num_documents, noun)} to train on, "
        f"{heldout.num_bytes / 1e6:.2f} MB in {_count(heldout.num_documents, noun)} held out"
        + (" (the end of each)" if cut else "")
    )


def _note(flaws: list[Flaw]) -> str:
    if not flaws:
        return ""
    return f"; {_count(len(flaws), 'text')} skipped (the first: {flaws[0].where}: {flaws[0].reason})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
