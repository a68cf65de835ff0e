"""From text to tokens and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zoo.spec.base import ConfigError, near
from zoo.spec.data import BytesTokenizer, FileTokenizer, TokenizerSpec

Tokens = npt.NDArray[np.unsignedinteger[Any]]

_PIECE_CHARS = 1 << 20
"""Longer texts are tokenized in pieces: the library holds some hundred bytes for each token of one call."""


class Tokenizer(Protocol):
    """Turns text into token ids below `vocab_size`. No text encodes to `separator`, which stands between documents."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def separator(self) -> int: ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every id."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def encode_documents(self, documents: Sequence[bytes | memoryview]) -> Iterator[Tokens]:
        """UTF-8 documents, each followed by the separator, as one stream in arrays of `dtype`."""


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
    dtype = np.dtype(np.uint8)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def encode_documents(self, documents: Sequence[bytes | memoryview]) -> Iterator[Tokens]:
        for document in documents:
            yield np.frombuffer(document, dtype=self.dtype)
            yield np.zeros(1, dtype=self.dtype)


class _FromFile:
    def __init__(self, spec: FileTokenizer) -> None:
        self._tokenizer = _read(tokenizer_file(spec))
        # A tokenizer.json can carry its own limits; a corpus must not lose text to them.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" within a document is text, not a separator
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.separator = _separator(spec, vocabulary, self._tokenizer)
        self.dtype = np.min_scalar_type(self.vocab_size - 1)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def encode_documents(self, documents: Sequence[bytes | memoryview]) -> Iterator[Tokens]:
        pieces, is_last = [], []
        for document in documents:
            found = list(_pieces(str(document, "utf-8")))
            pieces += found
            is_last += [False] * (len(found) - 1) + [True]
        encoded = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        for encoding, last in zip(encoded, is_last, strict=True):
            yield np.array(encoding.ids + [self.separator] * last, dtype=self.dtype)


def tokenizer_file(spec: FileTokenizer) -> Path:
    """The file that `spec.path` means.

    Raises:
        ConfigError: there is none.
    """
    path = Path(spec.path).expanduser()
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"tokenizer.path: found {spec.path!r}; there is no file {path}")
    return path


def _read(path: Path) -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ConfigError(
            "tokenizer.type: found 'file'; needs the package tokenizers; pip install tokenizers, or use tokenizer=bytes"
        ) from None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"tokenizer.path: found '{path}'; not a tokenizer.json: {error}") from error


def _separator(spec: FileTokenizer, vocabulary: dict[str, int], tokenizer: Any) -> int:
    if spec.separator not in vocabulary:
        special = sorted(str(token) for token in tokenizer.get_added_tokens_decoder().values() if token.special)
        raise ConfigError(
            f"tokenizer.separator: found {spec.separator!r}; must be a token of {spec.path}; "
            + (near(spec.separator, vocabulary) or f"its special tokens: {' '.join(special[:20]) or 'none'}")
        )
    return vocabulary[spec.separator]


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text after line ends where it has them."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = text.rfind("\n", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]
