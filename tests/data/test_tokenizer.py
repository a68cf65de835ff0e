"""Tokenizers: text survives the round trip, and documents never hold their separator."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data import tokenizer as module
from zoo.data.tokenizer import load_tokenizer
from zoo.spec.base import ConfigError
from zoo.spec.data import BytesTokenizer, FileTokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@settings(deadline=None)
@given(TEXT)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = load_tokenizer(BytesTokenizer())
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.separator not in ids
    assert tokenizer.decode(ids) == text


def test_bytes_that_are_no_text_are_shown_as_replacement() -> None:
    assert load_tokenizer(BytesTokenizer()).decode([0xC3, 0x41]) == "\ufffdA"


def test_byte_documents_end_in_separators() -> None:
    tokenizer = load_tokenizer(BytesTokenizer())
    parts = list(tokenizer.encode_documents([b"ab", b"", memoryview(b"c")]))
    assert np.concatenate(parts).tobytes() == b"ab\0\0c\0"
    assert {part.dtype for part in parts} == {np.dtype(np.uint8)}


def test_file_tokenizer_neither_truncates_nor_pads(bpe: FileTokenizer) -> None:
    tokenizer = load_tokenizer(bpe)
    text = "import Path  # zw\u00f6lf \U0001f600\n" * 20
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
    assert (tokenizer.vocab_size, tokenizer.separator, tokenizer.dtype) == (400, 1, np.uint16)


def test_a_separator_spelt_out_in_a_document_is_text(bpe: FileTokenizer) -> None:
    tokenizer = load_tokenizer(bpe)
    ids = np.concatenate([*tokenizer.encode_documents([b"a<|endoftext|>b", b"c"])])
    assert np.flatnonzero(ids == tokenizer.separator).tolist() == [len(ids) - 3, len(ids) - 1]
    assert tokenizer.decode(ids.tolist()) == "a<|endoftext|>b<|endoftext|>c<|endoftext|>"


def test_long_texts_are_cut_after_lines(bpe: FileTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_CHARS", 10)
    assert list(module._pieces("one\ntwo\nthree four five six\n")) == ["one\ntwo\n", "three four", " five six\n"]
    assert list(module._pieces("")) == [""]
    tokenizer = load_tokenizer(bpe)
    text = "one\ntwo\nthree four five six\n"
    ids = np.concatenate([*tokenizer.encode_documents([text.encode(), b""])])
    assert tokenizer.decode(ids.tolist()) == text + "<|endoftext|>" * 2


def test_a_directory_means_its_tokenizer_json(bpe: FileTokenizer) -> None:
    folder = bpe.replace(path=str(Path(bpe.path).parent))
    assert load_tokenizer(folder).encode("self") == load_tokenizer(bpe).encode("self")


def test_mistakes_say_what_to_do(bpe: FileTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer\.path: found 'no/where'; there is no file no/where$"):
        load_tokenizer(bpe.replace(path="no/where"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^tokenizer\.path: found .*; not a tokenizer\.json: "):
        load_tokenizer(bpe.replace(path=str(tmp_path)))
    with pytest.raises(
        ConfigError, match=r"^tokenizer\.separator: found '<\|endoftex\|>'; .*did you mean <\|endoftext"
    ):
        load_tokenizer(bpe.replace(separator="<|endoftex|>"))
    with pytest.raises(ConfigError, match=r"its special tokens: <pad> <\|endoftext\|>$"):
        load_tokenizer(bpe.replace(separator="0123456789"))


def test_a_missing_library_gives_the_command(bpe: FileTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"^tokenizer\.type: found 'file'; .*; pip install tokenizers, or use"):
        load_tokenizer(bpe)
