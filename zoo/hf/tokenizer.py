"""The tokenizer that belongs to a checkpoint, for writing text with its model."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from zoo.data.tokenizer import load_tokenizer, tokenizer_file
from zoo.hf.source import Source
from zoo.hf.tensors import read_json
from zoo.spec.base import ConfigError, Spec, choice_of, decode
from zoo.spec.data import BytesTokenizer, FileTokenizer, TokenizerSpec

TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    TOKENIZER,
    GENERATION,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What stands beside the weights of a Hugging Face checkpoint and is copied with them."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Text(Protocol):
    """Turns prompts into tokens and tokens into text."""

    @property
    def ends(self) -> Collection[int]:
        """Tokens that end a text."""

    @property
    def start(self) -> int | None:
        """The token that stands before a text where nothing else does; None: there is none."""

    def encode(self, text: str) -> list[int]: ...

    def encode_plain(self, text: str) -> list[int]:
        """The tokens of the text alone, without what a prompt begins with."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def special(self, text: str) -> int | None:
        """The id of a special token, by how it is written; None: there is no such one."""


class _Settings(Spec):
    tokenizer: choice_of(TokenizerSpec)  # type: ignore[valid-type]


def text_of(source: Source, tokenizer: str | None = None) -> Text:
    """The tokenizer of a checkpoint.

    Args:
        tokenizer: another one: `bytes`, or a tokenizer.json or its directory.

    Raises:
        ConfigError: there is none, or a package that reads it is missing.
    """
    if tokenizer == "bytes":
        return _OfRun(BytesTokenizer())
    if tokenizer is not None:
        path = Path(tokenizer).expanduser()
        return _OfLibrary(_read(path / TOKENIZER if path.is_dir() else path), _ends(source))
    if source.family is None and (spec := _of_run(source)) is not None:
        return _OfRun(spec)
    if source.path.is_file():
        return _OfLibrary(_inside(source.path).backend_tokenizer, _ends(source))
    if not (source.path / TOKENIZER).is_file():
        raise ConfigError(f"{source.path}: holds no {TOKENIZER}; name one, or bytes: tokenizer=...")
    return _OfLibrary(_read(source.path / TOKENIZER), _ends(source))


def end_of_text(source: Source) -> str:
    """How the token is written that ends a text of a Hugging Face checkpoint.

    Raises:
        ConfigError: nothing says which it is.
    """
    read = _read(source.path / TOKENIZER)
    written = [read.id_to_token(token) for token in sorted(_ends(source))]
    found = next((text for text in written if text is not None), None)
    if found is None:
        advice = "name the token that ends a document: tokenizer.separator=..."
        raise ConfigError(f"tokenizer: nothing in {source.path} says how a text ends; {advice}")
    return str(found)


def write_tokenizer(source: Source, directory: Path) -> list[str]:
    """Copy the tokenizer of a checkpoint and what it says about generation; what a person should know about it."""
    if source.path.is_file():
        try:
            _inside(source.path).save_pretrained(directory)
        except ConfigError as error:
            return [f"no tokenizer was written: {error}"]
        return []
    spec = _of_run(source) if source.family is None else None
    if isinstance(spec, BytesTokenizer):
        return ["the model reads bytes, for which there is no tokenizer file: tokenizer=bytes"]
    if isinstance(spec, FileTokenizer):
        file = tokenizer_file(spec)
        _copy_beside(file.parent, directory)  # a run that started from a checkpoint writes text as that does
        shutil.copyfile(file, directory / TOKENIZER)
        return []
    found = _copy_beside(source.path, directory)
    return [] if TOKENIZER in found else [f"the source holds no {TOKENIZER}"]


def _copy_beside(place: Path, directory: Path) -> list[str]:
    """Copy what belongs to a tokenizer; the names of the files that were found."""
    found = [name for name in TOKENIZER_FILES if (place / name).is_file()]
    for name in found:
        shutil.copyfile(place / name, directory / name)
    return found


def _of_run(source: Source) -> TokenizerSpec | None:
    """The tokenizer that a run was trained with."""
    settings = source.config.get("tokenizer")
    return None if settings is None else decode(_Settings, {"tokenizer": settings}, "settings").tokenizer


def _ends(source: Source) -> frozenset[int]:
    """Tokens that end a text, in the words of Hugging Face: a number, several, or nothing."""
    generation = source.path / GENERATION
    said = read_json(generation) if generation.is_file() else {}
    found = said.get("eos_token_id", source.config.get("eos_token_id"))
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"tokenizer: found {str(path)!r}; there is no such file")
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: needs the package tokenizers; pip install 'moe-zoo[data]'") from None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"{path}: not a {TOKENIZER}: {error}") from None


def _inside(path: Path) -> Any:
    """The tokenizer in a GGUF file, as transformers makes it of the metadata.

    Raises:
        ConfigError: transformers is not installed, or does not know this kind.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        advice = f"pip install 'moe-zoo[hf]', or name a {TOKENIZER}: tokenizer=..."
        raise ConfigError(f"{path}: the tokenizer of a GGUF file needs the package transformers; {advice}") from None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # whatever a file that is not understood leads to
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{path}: transformers does not read its tokenizer: {reason}; name a {TOKENIZER}") from None


class _OfRun:
    """The tokenizer of a run of zoo. No text has its separator, which ends documents."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._tokenizer = load_tokenizer(spec)
        self.ends = frozenset([self._tokenizer.separator])

    @property
    def start(self) -> int | None:
        begin = self._tokenizer.begin
        return self._tokenizer.separator if begin is None else begin

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text) or [self._tokenizer.separator]

    def encode_plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # A model may know more tokens than its tokenizer: their rows were never trained.
        known = self._tokenizer.vocab_size
        return self._tokenizer.decode([token for token in ids if token < known and token not in self.ends])

    def special(self, text: str) -> int | None:
        return None


class _OfLibrary:
    """A tokenizer.json as transformers uses it: special tokens are understood in a prompt, and left out of text."""

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        self._tokenizer, self.ends = tokenizer, ends
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def start(self) -> int | None:
        begin: list[int] = self._tokenizer.encode("").ids
        return begin[0] if begin else min(self.ends, default=None)

    def encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        if not ids:
            raise ConfigError(
                "prompt: found ''; this tokenizer makes no token of it, and a model needs one to begin with"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def special(self, text: str) -> int | None:
        added: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        return next((token for token, said in added.items() if said.special and said.content == text), None)
