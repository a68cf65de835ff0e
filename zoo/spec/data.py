"""What a run learns from: where the text lies, how it is split, and how it becomes tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from zoo.spec.base import TypedSpec, choice_of, problem, register_spec


class DataSpec(TypedSpec):
    """Where the text comes from."""


class SplitSpec(DataSpec):
    """One source of text. Every document falls, as a whole, into the training text or the held-out text."""

    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents that is held out, on average over seeds."""
    seed: NonNegativeInt = 0
    """Another seed holds out other documents."""


@register_spec
class StdlibData(SplitSpec):
    """The source files of the running Python's standard library: code and English that every machine has."""

    type: Literal["stdlib"] = "stdlib"


class RecordsSpec(SplitSpec):
    """Text in lines or rows, some of which may be unusable."""

    text_key: str = "text"
    """Key of a JSON line, or column of a table, that holds the text."""
    prompt_key: str | None = None
    """Key or column of a text that comes before it and is read, not learned: the loss counts `text_key` alone."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What becomes of a line, row or file without usable text. `skip` leaves it out, counts it and says where it is."""
    max_bad: NonNegativeInt = 1000
    """More of these than so many stop the run even with `skip`."""

    @model_validator(mode="after")
    def _check_keys(self) -> RecordsSpec:
        if self.prompt_key == self.text_key:
            raise problem("prompt_key", self.prompt_key, "must differ from text_key")
        return self


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""Files, directories (read recursively, hidden names left out) and glob patterns (`**` crosses directories)."""


class PathsSpec(RecordsSpec):
    """Files that the user names."""

    paths: Paths
    heldout_paths: Paths = ()
    """What is held out; then `paths` is trained on to the last document, and `heldout_fraction` has no say."""

    @model_validator(mode="after")
    def _check_paths(self) -> PathsSpec:
        if not self.paths or "" in self.paths:
            rule = "must name files, directories or patterns"
            raise problem("paths", list(self.paths), rule, "for example data.paths=[texts/,more.jsonl]")
        if "" in self.heldout_paths:
            raise problem("heldout_paths", list(self.heldout_paths), "must name files, directories or patterns")
        return self


@register_spec
class FilesData(PathsSpec):
    """Text. The suffix gives the format; `.gz` or `.zst` after it is unpacked.

    `.jsonl`: a document a line. `.parquet`, `.arrow`, `.feather`: a document a row. Anything else: UTF-8 text, a
    document a file.
    """

    type: Literal["files"] = "files"


@register_spec
class ChatData(PathsSpec):
    """Conversations, one on each line of `.jsonl` files: {"messages": [{"role": "user", "content": "..."}, ...]}.

    What the assistant says is learned, all else is read. Special tokens are understood, as transformers does, in all of
    the text that the template makes.
    """

    type: Literal["chat"] = "chat"
    text_key: str = "messages"
    """The key of the list of messages."""
    template: str = "chatml"
    """How messages become text: `chatml`, a file in jinja2, a tokenizer_config.json, or a tokenizer's directory."""

    @model_validator(mode="after")
    def _check_chat(self) -> ChatData:
        if self.prompt_key is not None:
            raise problem("prompt_key", self.prompt_key, "is not for conversations; leave it out")
        return self


@register_spec
class HFData(RecordsSpec):
    """A data set of the library datasets: a directory that its `save_to_disk` wrote, or one of the Hugging Face Hub."""

    type: Literal["hf"] = "hf"
    path: str
    """The directory, or with `online` the name on the Hub."""
    name: str | None = None
    """Which configuration of a data set on the Hub."""
    revision: str | None = None
    """Commit, tag or branch on the Hub; null: the newest."""
    split: str = "train"
    """Which part is read."""
    heldout_split: str | None = None
    """Which part is held out; then `split` is trained on to the last row, and `heldout_fraction` has no say."""
    online: bool = False
    """Look for `path` on the Hub. Nothing is fetched unless this is set."""
    streaming: bool = True
    """Read rows from the Hub as they come; false downloads the whole data set into the cache of datasets first."""
    max_documents: PositiveInt | None = None
    """Read no more than the first so many rows of each split; null: all."""

    @model_validator(mode="after")
    def _check(self) -> HFData:
        if not self.path:
            raise problem("path", self.path, "must name a directory, or a data set of the Hub with data.online=true")
        if self.heldout_split == self.split:
            raise problem("heldout_split", self.heldout_split, "must differ from split")
        for name in ("name", "revision"):
            if getattr(self, name) is not None and not self.online:
                raise problem(name, getattr(self, name), "is for data sets of the Hub: data.online=true")
        return self


@register_spec
class MixtureData(DataSpec):
    """Several sources, each row of a batch from one of them. Each source is split by its own rule."""

    type: Literal["mixture"] = "mixture"
    sources: dict[str, choice_of(SplitSpec)]  # type: ignore[valid-type]
    """Descriptions by name."""
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Shares of the training tokens, of any scale; all sources or none. None: each as often as it has tokens."""

    @model_validator(mode="after")
    def _check(self) -> MixtureData:
        if not self.sources:
            example = "for example +data@data.sources.code=files data.sources.code.paths=[src/]"
            raise problem("sources", {}, "must name at least one source", example)
        if self.weights and self.weights.keys() != self.sources.keys():
            rule = f"must give a weight to each of the sources: {', '.join(self.sources)}"
            raise problem("weights", ", ".join(self.weights), rule)
        return self


class TokenizerSpec(TypedSpec):
    """How text becomes tokens."""


@register_spec
class BytesTokenizer(TokenizerSpec):
    """UTF-8 bytes: 256 tokens. Byte 0, which no text contains, ends each document."""

    type: Literal["bytes"] = "bytes"


@register_spec
class CheckpointTokenizer(TokenizerSpec):
    """The tokenizer of the checkpoint that the run starts from. It is looked up when the settings are decoded."""

    type: Literal["checkpoint"] = "checkpoint"
    separator: str | None = None
    """The token that ends each document; null: what the checkpoint ends a text with."""


@register_spec
class FileTokenizer(TokenizerSpec):
    """A `tokenizer.json` as the library tokenizers writes it."""

    type: Literal["file"] = "file"
    path: str
    """The file, or a directory that holds it."""
    separator: str
    """The token that ends each document."""
    begin: str | None = None
    """A token of its own that begins each document; null: none, the end of the document before stands there."""

    @model_validator(mode="after")
    def _check(self) -> FileTokenizer:
        if not self.path:
            raise problem("path", self.path, "must name a tokenizer.json or its directory")
        if self.begin == self.separator:
            raise problem("begin", self.begin, "must differ from separator, which stands between documents alone")
        return self
