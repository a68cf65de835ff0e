"""From text to tokens and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from zoo.data.formats import Markup, Part
from zoo.data.paths import what_is_there
from zoo.spec.base import ConfigError, near
from zoo.spec.data import BytesTokenizer, FileTokenizer, TokenizerSpec

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Learned = npt.NDArray[np.uint8]

_MAX_FILE_BYTES = 256 << 20
_PIECE_CHARS = 1 << 20
"""Longer texts are tokenized in pieces: the library holds some hundred bytes for each token of one call."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Documents as tokens."""

    tokens: Tokens
    lengths: npt.NDArray[np.int64]
    """Tokens of each document."""
    learned: Learned | None = None
    """1 for each token that is learned, 0 for one that is only read; None: all are learned."""


class Tokenizer(Protocol):
    """Turns text into token ids below `vocab_size`. No text encodes to `separator`, which ends documents."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def separator(self) -> int: ...

    @property
    def begin(self) -> int | None:
        """A token of its own that stands before each document."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every id."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def encode_documents(self, documents: Sequence[tuple[Part, ...]]) -> Encoded:
        """Documents one after the other, each with its `begin` and its separator.

        Called from a thread beside the one that reads: the library works without holding Python's lock.
        """


def load_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """The tokenizer that `spec` describes.

    Raises:
        ConfigError: its file or its library is missing, or the file is not a tokenizer that has the separator.
    """
    if isinstance(spec, BytesTokenizer):
        return _Bytes()
    if isinstance(spec, FileTokenizer):
        return _FromFile(spec)
    raise TypeError(f"no tokenizer for {type(spec).__qualname__}")


class _Bytes:
    vocab_size = 256
    separator = 0
    begin = None
    dtype = np.dtype(np.uint8)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def encode_documents(self, documents: Sequence[tuple[Part, ...]]) -> Encoded:
        # Of a conversation the end is not learned: what the template writes last is what ends an answer.
        texts, counts, learned = _flat([[*parts, (b"\0", parts[-1][1])] for parts in documents])
        tokens: Tokens = np.frombuffer(b"".join(texts), dtype=self.dtype)
        return _encoded(tokens, [len(text) for text in texts], counts, learned)


class _FromFile:
    def __init__(self, spec: FileTokenizer) -> None:
        self._path = tokenizer_file(spec)
        self._tokenizer = _read(self._path)
        # A tokenizer.json can carry its own limits; a corpus must not lose text to them.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" within a document is text, not a separator
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=0) + 1
        self.separator = _special(spec, "separator", vocabulary, self._tokenizer)
        self.begin = None if spec.begin is None else _special(spec, "begin", vocabulary, self._tokenizer)
        self.dtype = np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def encode_documents(self, documents: Sequence[tuple[Part, ...]]) -> Encoded:
        if documents and isinstance(documents[0][0][0], Markup):
            return self._encode_conversations(documents)
        pieces, counts, learned = _flat(
            [[(piece, learn) for text, learn in parts for piece in _pieces(str(text, "utf-8"))] for parts in documents]
        )
        with _explained(f"tokenizer.path: found '{self._path}'; cannot encode this text"):
            found = iter(self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
        ids: list[int] = []
        lengths: list[int] = []
        before = 0
        for count in counts:
            if self.begin is not None:
                ids.append(self.begin)
            for left in range(count, 0, -1):
                ids += next(found).ids
                if left == 1:  # the end of a document is learned with the text that it ends
                    ids.append(self.separator)
                lengths.append(len(ids) - before)
                before = len(ids)
        return _encoded(np.array(ids, dtype=self.dtype), lengths, counts, learned)

    def encode_conversation(self, parts: tuple[Part, ...]) -> tuple[list[int], list[bool]]:
        """The tokens of what a chat template wrote, as transformers has them, and which of them are learned.

        It is tokenized as a whole, special tokens understood. A token belongs to the part in which it begins.
        """
        texts = [str(text, "utf-8") for text, _ in parts]
        with _explained(f"tokenizer.path: found '{self._path}'; cannot encode this text"):
            found = self._understanding.encode("".join(texts), add_special_tokens=False)
        ends = np.cumsum([len(text) for text in texts])
        places = np.searchsorted(ends, [start for start, _ in found.offsets], side="right")
        return found.ids, [parts[min(place, len(parts) - 1)][1] for place in places.tolist()]

    @cached_property
    def _understanding(self) -> Any:
        """The same tokenizer, to which the special tokens in a text are what they look like."""
        found = _read(self._path)
        found.no_truncation()
        found.no_padding()
        return found

    def _encode_conversations(self, documents: Sequence[tuple[Part, ...]]) -> Encoded:
        """Conversations with their separators, which are not learned: the template says what ends an answer."""
        tokens: list[int] = []
        mask: list[bool] = []
        lengths = []
        for parts in documents:
            ids, learned = self.encode_conversation(parts)
            begins = [] if self.begin is None or ids[:1] == [self.begin] else [self.begin]
            tokens += [*begins, *ids, self.separator]
            mask += [*(False for _ in begins), *learned, False]
            lengths.append(len(begins) + len(ids) + 1)
        return Encoded(np.array(tokens, self.dtype), np.array(lengths, np.int64), np.array(mask, np.uint8))


T = TypeVar("T")


def _flat(documents: list[list[tuple[T, bool]]]) -> tuple[list[T], list[int], list[bool]]:
    """The pieces of all documents, how many each document has, and which of them are learned."""
    pieces = [piece for document in documents for piece, _ in document]
    learned = [learn for document in documents for _, learn in document]
    return pieces, [len(document) for document in documents], learned


def _encoded(tokens: Tokens, lengths: list[int], counts: list[int], learned: list[bool]) -> Encoded:
    """Tokens of pieces of these lengths, so many to a document."""
    sizes = np.array(lengths, dtype=np.int64)
    ends = np.concatenate([[0], sizes.cumsum()])[np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])]
    mask = None if all(learned) else np.repeat(np.array(learned, np.uint8), sizes)
    return Encoded(tokens, np.diff(ends), mask)


def tokenizer_file(spec: FileTokenizer) -> Path:
    """The file that `spec.path` means.

    Raises:
        ConfigError: there is none.
    """
    path = Path(spec.path).expanduser()
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"tokenizer.path: found {spec.path!r}; there is no file {path}; {what_is_there(path)}")
    return path


def _read(path: Path) -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ConfigError(
            "tokenizer.type: found 'file'; needs the package tokenizers; pip install tokenizers, or use tokenizer=bytes"
        ) from None
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ConfigError(f"tokenizer.path: found '{path}'; larger than {_MAX_FILE_BYTES >> 20} MiB; not read")
    with _explained(f"tokenizer.path: found '{path}'; not a tokenizer.json"):
        return tokenizers.Tokenizer.from_file(str(path))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """The library raises nothing more specific than Exception, and a panic of its Rust code is not even that."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{what}: {error}") from error


def _special(spec: FileTokenizer, field: str, vocabulary: dict[str, int], tokenizer: Any) -> int:
    token: str = getattr(spec, field)
    if token not in vocabulary:
        special = sorted(str(token) for token in tokenizer.get_added_tokens_decoder().values() if token.special)
        raise ConfigError(
            f"tokenizer.{field}: found {token!r}; must be a token of {spec.path}; "
            + (near(token, vocabulary) or f"its special tokens: {' '.join(special[:20]) or 'none'}")
        )
    return vocabulary[token]


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text after line ends where it has them."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = text.rfind("\n", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]
