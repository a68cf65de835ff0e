"""A corpus: documents as two streams of tokens, one to train on and one held out."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path

from zoo.data import cache
from zoo.data.build import Builder, count, has_both_sides, shard_name
from zoo.data.documents import Side, find_sources
from zoo.data.shards import SIDES, Extent, Shard, open_shard
from zoo.data.stream import Stream
from zoo.data.tokenizer import load_tokenizer
from zoo.spec.base import ConfigError
from zoo.spec.data import DataSpec, HFData, MixtureData, PathsSpec, SplitSpec, TokenizerSpec

_HASHED_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens of a training text and a held-out text, each document followed by the tokenizer's separator.

    The streams hold the smallest unsigned type that holds the vocabulary.
    """

    train: Stream
    heldout: Stream
    vocab_size: int
    boundary: int
    """The token at which a document begins (`zoo.data.packing`)."""
    sha256: str
    """Of all tokens and their split: equal hashes, equal corpus."""
    num_train_documents: int
    num_heldout_documents: int
    num_train_bytes: int
    """UTF-8 bytes of the text that is learned, and one for each separator."""
    num_heldout_bytes: int
    train_bytes_per_token: float
    """Divide bits per token by this to get bits per byte. Exactly 1 when tokens are bytes."""
    heldout_bytes_per_token: float
    """The same for the held-out text."""
    description: str
    """One line for people."""
    parts: dict[str, Corpus] = field(default_factory=dict)
    """The sources of a mixture by name, each to be evaluated on its own; empty for one source."""


def load_corpus(data: DataSpec, tokenizer: TokenizerSpec, cache_dir: Path | None = None) -> Corpus:
    """Read, split and tokenize the text that `data` names.

    The result depends on names and contents of the files alone, not on the order in which a directory lists them. A
    document is held out when a hash of it (for the standard library: of its name) falls below `heldout_fraction`, so it
    keeps its side when others come and go. When that leaves a side empty, the end of every document is held out.

    Args:
        cache_dir: Keeps the tokens on disk, shard by shard. A later call with the same settings and unchanged files
            maps them into memory instead of reading the files; one after a kill goes on where that one stopped.

    Raises:
        ConfigError: no text there, or unreadable, or not text (see `RecordsSpec.on_bad`), or a library is missing.
    """
    if isinstance(data, MixtureData):
        return _mixture(data, {name: load_corpus(part, tokenizer, cache_dir) for name, part in data.sources.items()})
    assert isinstance(data, SplitSpec)
    sources = find_sources(data)
    key = cache.key_of(data, tokenizer, sources) if cache_dir else ""
    place = cache_dir / key if cache_dir else None
    builder = Builder(data, sources, load_tokenizer(tokenizer), key, place)
    if place is None:
        return _corpus(builder, _tokenize(builder))
    found = _complete(builder, place)
    if found is None:
        with cache.locked(place):
            found = _complete(builder, place)  # another process may have been first
            if found is None:
                found = _tokenize(builder)
                facts = {"shards": len(found.shards), "cut": builder.cut, "sha256": found.sha256}
                cache.write_facts(place, facts, builder.flaws)
    return _corpus(builder, found)


@dataclass(frozen=True, eq=False)
class _Tokenized:
    shards: list[Shard]
    sha256: str


def _tokenize(builder: Builder) -> _Tokenized:
    builder.cut = not has_both_sides(builder.data, builder.sources)
    shards = list(builder.shards())
    extents = {side: sum((shard.facts.extents[side] for shard in shards), Extent()) for side in SIDES}
    if not all(extent.num_documents for extent in extents.values()):
        files = count(len(builder.sources), "file")
        which = "no text" if not extents["train"].num_documents else "no held-out text"
        raise ConfigError(f"data: found {which} in {files}{_note(builder)}; give more text")
    return _Tokenized(shards, _hash(*(_stream(builder, shards, side) for side in SIDES)))


def _complete(builder: Builder, place: Path) -> _Tokenized | None:
    """What lies in a directory that was declared complete, its files mapped; None when it is not, or a file is gone."""
    facts = cache.read_facts(place)
    if facts is None:
        return None
    try:
        number, builder.cut, sha256 = int(facts["shards"]), bool(facts["cut"]), str(facts["sha256"])
    except (KeyError, TypeError, ValueError):
        return None
    paths = [place / shard_name(index) for index in range(number)]
    if not all(path.is_file() for path in paths):
        return None
    shards = [open_shard(path) for path in paths]
    for shard in shards:
        builder.judge(shard.facts.flaws)
    return _Tokenized(shards, sha256)


def _stream(builder: Builder, shards: list[Shard], side: Side) -> Stream:
    return Stream([shard.pieces[side] for shard in shards], builder.tokenizer.begin)


def _corpus(builder: Builder, found: _Tokenized) -> Corpus:
    shards, tokenizer = found.shards, builder.tokenizer
    train, heldout = (sum((shard.facts.extents[side] for shard in shards), Extent()) for side in SIDES)
    return Corpus(
        train=_stream(builder, shards, "train"),
        heldout=_stream(builder, shards, "heldout"),
        vocab_size=tokenizer.vocab_size,
        boundary=tokenizer.separator if tokenizer.begin is None else tokenizer.begin,
        sha256=found.sha256,
        num_train_documents=train.num_documents,
        num_heldout_documents=heldout.num_documents,
        num_train_bytes=train.num_bytes,
        num_heldout_bytes=heldout.num_bytes,
        train_bytes_per_token=train.bytes_per_token,
        heldout_bytes_per_token=heldout.bytes_per_token,
        description=_describe(builder, train, heldout) + f", sha256 {found.sha256[:12]}" + _note(builder),
    )


def _mixture(data: MixtureData, parts: dict[str, Corpus]) -> Corpus:
    weights = data.weights or {name: float(len(part.train)) for name, part in parts.items()}
    total = sum(weights.values())
    begin = next(iter(parts.values())).train.begin
    listed = [[name, part.sha256, weights[name]] for name, part in parts.items()]
    shares = [f"{100 * weights[name] / total:.3g}% {name} ({part.description})" for name, part in parts.items()]
    some = next(iter(parts.values()))
    return Corpus(
        train=Stream.joined({name: (part.train, weights[name]) for name, part in parts.items()}, begin),
        heldout=Stream.joined({name: (part.heldout, 1.0) for name, part in parts.items()}, begin),
        vocab_size=some.vocab_size,
        boundary=some.boundary,
        sha256=hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        num_train_documents=sum(part.num_train_documents for part in parts.values()),
        num_heldout_documents=sum(part.num_heldout_documents for part in parts.values()),
        num_train_bytes=sum(part.num_train_bytes for part in parts.values()),
        num_heldout_bytes=sum(part.num_heldout_bytes for part in parts.values()),
        train_bytes_per_token=sum(weights[name] / total * part.train_bytes_per_token for name, part in parts.items()),
        heldout_bytes_per_token=_mean_bytes(parts),
        description="; ".join(shares),
        parts=parts,
    )


def _mean_bytes(parts: dict[str, Corpus]) -> float:
    """Bytes over tokens of all held-out texts together."""
    tokens = {name: part.num_heldout_bytes / part.heldout_bytes_per_token for name, part in parts.items()}
    return sum(part.num_heldout_bytes for part in parts.values()) / sum(tokens.values())


def _hash(*sides: Stream) -> str:
    digest = hashlib.sha256()
    for tokens in sides:
        digest.update(f"{tokens.dtype.itemsize} {len(tokens)}\n".encode())
        for start in range(0, len(tokens), _HASHED_AT_ONCE):
            part = tokens[start : start + _HASHED_AT_ONCE]
            digest.update(part.astype(tokens.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()


def _describe(builder: Builder, train: Extent, heldout: Extent) -> str:
    data, noun = builder.data, "document"
    if isinstance(data, PathsSpec):
        name = " ".join(data.paths)
    elif isinstance(data, HFData):
        name = f"{data.path} {data.split}"
    else:
        name, noun = f"standard library of Python {platform.python_version()}", "file"
    return (
        f"{name}: {train.num_bytes / 1e6:.2f} MB in {count(train.num_documents, noun)} to train on, "
        f"{heldout.num_bytes / 1e6:.2f} MB in {count(heldout.num_documents, noun)} held out"
        + (" (the end of each)" if builder.cut else "")
    )


def _note(builder: Builder) -> str:
    flaws = builder.flaws
    if not flaws:
        return ""
    where, reason = flaws[0]
    all_of_them = f"; all: {builder.place / cache.SKIPPED}" if builder.place and len(flaws) > 1 else ""
    return f"; {count(len(flaws), 'text')} skipped (the first: {where}: {reason}{all_of_them})"
