"""Tokenizers: text survives the round trip, and documents never hold their separator."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.data import tokenizer as module
from zoo.data.formats import Part
from zoo.data.tokenizer import load_tokenizer
from zoo.spec.base import ConfigError
from zoo.spec.data import BytesTokenizer, FileTokenizer


def whole(text: bytes | memoryview) -> tuple[Part, ...]:
    """A document that is learned from end to end."""
    return ((text, True),)


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
    found = tokenizer.encode_documents([whole(b"ab"), whole(b""), whole(memoryview(b"c"))])
    assert found.tokens.tobytes() == b"ab\0\0c\0"
    assert (found.tokens.dtype, found.lengths.tolist(), found.learned) == (np.uint8, [3, 1, 2], None)
    assert tokenizer.encode_documents([]).lengths.tolist() == []


def test_file_tokenizer_neither_truncates_nor_pads(bpe: FileTokenizer) -> None:
    tokenizer = load_tokenizer(bpe)
    text = "import Path  # zw\u00f6lf \U0001f600\n" * 20
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
    assert (tokenizer.vocab_size, tokenizer.separator, tokenizer.dtype) == (400, 1, np.uint16)


def test_a_separator_spelt_out_in_a_document_is_text(bpe: FileTokenizer) -> None:
    tokenizer = load_tokenizer(bpe)
    ids = tokenizer.encode_documents([whole(b"a<|endoftext|>b"), whole(b"c")]).tokens
    assert np.flatnonzero(ids == tokenizer.separator).tolist() == [len(ids) - 3, len(ids) - 1]
    assert tokenizer.decode(ids.tolist()) == "a<|endoftext|>b<|endoftext|>c<|endoftext|>"


def test_long_texts_are_cut_after_lines(bpe: FileTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_CHARS", 10)
    assert list(module._pieces("one\ntwo\nthree four five six\n")) == ["one\ntwo\n", "three four", " five six\n"]
    assert list(module._pieces("")) == [""]
    tokenizer = load_tokenizer(bpe)
    text = "one\ntwo\nthree four five six\n"
    found = tokenizer.encode_documents([whole(text.encode()), whole(b"")])
    assert found.lengths.tolist() == [len(found.tokens) - 1, 1]
    assert tokenizer.decode(found.tokens.tolist()) == text + "<|endoftext|>" * 2


def test_what_is_only_read_is_marked(bpe: FileTokenizer) -> None:
    document = ((b"import os", False), (b" as system", True))
    for tokenizer in (load_tokenizer(bpe), load_tokenizer(BytesTokenizer())):
        found = tokenizer.encode_documents([document, whole(b"x")])
        assert found.learned is not None
        assert found.learned[found.lengths[0] :].all()
        tokens = found.tokens[: found.lengths[0]]
        read, learned = (tokens[found.learned[: len(tokens)] == value] for value in (0, 1))
        assert tokenizer.decode(read.tolist()) == "import os"
        assert learned[-1] == tokenizer.separator
        assert tokenizer.decode(learned[:-1].tolist()) == " as system"


def test_a_first_token_of_its_own(bpe: FileTokenizer) -> None:
    tokenizer = load_tokenizer(bpe.replace(begin="<pad>"))
    found = tokenizer.encode_documents([whole(b"a"), whole(b""), ((b"b", False), (b"c", True))])
    assert tokenizer.begin == 0
    assert tokenizer.decode(found.tokens.tolist()) == ("<pad>a<|endoftext|><pad><|endoftext|><pad>bc<|endoftext|>")


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"model": null}', b"[" * 100_000, b'{"version": "1.0"}'])
def test_what_is_no_tokenizer(bpe: FileTokenizer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^tokenizer\.path: found .*; not a tokenizer\.json: "):
        load_tokenizer(bpe.replace(path=str(tmp_path)))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
def test_a_damaged_tokenizer_works_or_says_so(
    bpe: FileTokenizer, tmp_path: Path, flips: list[tuple[float, int]]
) -> None:
    content = bytearray(Path(bpe.path).read_bytes())
    for place, flip in flips:
        content[int(place * len(content))] ^= flip
    (tmp_path / "tokenizer.json").write_bytes(content)
    try:
        tokenizer = load_tokenizer(bpe.replace(path=str(tmp_path)))
        ids = tokenizer.encode_documents([whole("import zw\u00f6lf".encode())]).tokens
    except ConfigError as error:
        assert str(error).startswith("tokenizer.")  # noqa: PT017
    else:
        assert ids.max() < tokenizer.vocab_size


def test_a_directory_means_its_tokenizer_json(bpe: FileTokenizer) -> None:
    folder = bpe.replace(path=str(Path(bpe.path).parent))
    assert load_tokenizer(folder).encode("self") == load_tokenizer(bpe).encode("self")


def test_mistakes_say_what_to_do(bpe: FileTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer\.path: found 'no/where'; there is no file no/where; .* holds "):
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
