"""What a run learns from: where the text lies, how it is split, and how it becomes tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, model_validator

from zoo.spec.base import TypedSpec, problem, register_spec


class DataSpec(TypedSpec):
    """Where the text comes from. Every document falls, as a whole, into the training text or the held-out text."""

    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents that is held out, on average over seeds."""
    seed: NonNegativeInt = 0
    """Another seed holds out other documents."""


@register_spec
class StdlibData(DataSpec):
    """The source files of the running Python's standard library: code and English that every machine has."""

    type: Literal["stdlib"] = "stdlib"


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


@register_spec
class FilesData(DataSpec):
    """Text that the user names. The suffix gives the format; `.gz` after it is unpacked.

    `.jsonl`: a document a line. `.parquet`: a document a row. Anything else: UTF-8 text, a document a file.
    """

    type: Literal["files"] = "files"
    paths: Annotated[tuple[str, ...], BeforeValidator(_listed)]
    """Files, directories (read recursively, hidden names left out) and glob patterns (`**` crosses directories)."""
    text_key: str = "text"
    """Key of a JSON line, or column of a Parquet file, that holds the text."""
    bad_lines: Literal["error", "skip"] = "error"
    """What becomes of a line, row or file without usable text. `skip` leaves it out and says how many there were."""

    @model_validator(mode="after")
    def _check(self) -> FilesData:
        if not self.paths or "" in self.paths:
            rule = "must name files, directories or patterns"
            raise problem("paths", list(self.paths), rule, "for example data.paths=[texts/,more.jsonl]")
        return self


class TokenizerSpec(TypedSpec):
    """How text becomes tokens."""


@register_spec
class BytesTokenizer(TokenizerSpec):
    """UTF-8 bytes: 256 tokens. Byte 0, which no text contains, ends each document."""

    type: Literal["bytes"] = "bytes"


@register_spec
class FileTokenizer(TokenizerSpec):
    """A `tokenizer.json` as the library tokenizers writes it."""

    type: Literal["file"] = "file"
    path: str
    """The file, or a directory that holds it."""
    separator: str
    """The token that ends each document."""

    @model_validator(mode="after")
    def _check(self) -> FileTokenizer:
        if not self.path:
            raise problem("path", self.path, "must name a tokenizer.json or its directory")
        return self
