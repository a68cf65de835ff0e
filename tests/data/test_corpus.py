"""Corpora: what is split, counted, hashed and kept."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.blocks.linear_loss import IGNORED
from zoo.data import build
from zoo.data.batches import Batches
from zoo.data.corpus import Corpus, load_corpus
from zoo.data.stream import Stream
from zoo.data.tokenizer import load_tokenizer
from zoo.spec.base import ConfigError
from zoo.spec.data import BytesTokenizer, FilesData, FileTokenizer, MixtureData, StdlibData

BYTES = BytesTokenizer()


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return load_corpus(StdlibData(), BYTES)


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """200 documents in two files below the current directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a"):
        rows = [json.dumps({"text": f"document {name}{number} zw\u00f6lf\n"}) for number in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


def data(*paths: str, **settings: Any) -> FilesData:
    return FilesData(paths=paths or (".",), **settings)


def documents(tokens: Stream) -> list[bytes]:
    *found, rest = tokens[:].tobytes().split(b"\0")
    assert rest == b""
    return found


def base_of(array: np.ndarray) -> object:
    """What an array is a view of, in the end."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


def test_standard_library_is_ten_megabytes_of_python(stdlib: Corpus) -> None:
    assert 6e6 < len(stdlib.train) + len(stdlib.heldout) < 16e6
    assert 0.01 < len(stdlib.heldout) / len(stdlib.train) < 0.15
    assert (stdlib.train.dtype, stdlib.vocab_size) == (np.uint8, 256)
    assert stdlib.num_train_documents == np.count_nonzero(stdlib.train[:] == 0)
    assert stdlib.num_heldout_documents == np.count_nonzero(stdlib.heldout[:] == 0)
    assert b"class JSONEncoder" in stdlib.train[:].tobytes() + stdlib.heldout[:].tobytes()
    assert stdlib.sha256[:12] in stdlib.description
    assert "Python 3." in stdlib.description


def test_tokens_are_read_only(stdlib: Corpus) -> None:
    with pytest.raises(ValueError, match="read-only"):
        stdlib.train[:][0] = 1


def test_every_document_is_on_one_side(lines: Path) -> None:
    corpus = load_corpus(data(heldout_fraction=0.25), BYTES)
    train, heldout = documents(corpus.train), documents(corpus.heldout)
    expected = [f"document {name}{number} zw\u00f6lf\n".encode() for name in "ab" for number in range(100)]
    assert sorted(train + heldout) == sorted(expected)
    assert [text for text in expected if text in set(train)] == train
    assert (corpus.num_train_documents, corpus.num_heldout_documents) == (len(train), len(heldout))
    assert (corpus.num_train_bytes, corpus.num_heldout_bytes) == (len(corpus.train), len(corpus.heldout))
    assert 30 < len(heldout) < 70
    assert corpus.heldout_bytes_per_token == corpus.train_bytes_per_token == 1


def test_documents_keep_their_side_when_others_come(lines: Path) -> None:
    alone = load_corpus(data("a.jsonl", heldout_fraction=0.25), BYTES)
    both = load_corpus(data(heldout_fraction=0.25), BYTES)
    assert set(documents(alone.heldout)) == {text for text in documents(both.heldout) if b" a" in text}


def test_another_seed_holds_out_others(lines: Path) -> None:
    first, second = (load_corpus(data(heldout_fraction=0.25, seed=seed), BYTES) for seed in (0, 1))
    assert set(documents(first.heldout)) != set(documents(second.heldout))
    assert first.sha256 != second.sha256


def test_the_order_of_a_listing_does_not_show(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_corpus(data(), BYTES).sha256
    walk: Callable[..., Any] = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **kw: ((a, b[::-1], c[::-1]) for a, b, c in walk(*args, **kw)))
    assert load_corpus(data(), BYTES).sha256 == before == load_corpus(data("b.jsonl", "a.jsonl"), BYTES).sha256


def test_hash_is_of_the_tokens_and_their_split(lines: Path) -> None:
    corpus = load_corpus(data(), BYTES)
    content = b""
    for side in (corpus.train, corpus.heldout):
        content += f"1 {len(side)}\n".encode() + side[:].tobytes()
    assert corpus.sha256 == hashlib.sha256(content).hexdigest()


def test_one_document_gives_its_end(tmp_path: Path) -> None:
    text = "zw\u00f6lf " * 100
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(data(str(tmp_path / "a.txt"), heldout_fraction=0.1), BYTES)
    train, heldout = documents(corpus.train)[0], documents(corpus.heldout)[0]
    assert (train + heldout).decode() == text
    assert len(heldout) == 70
    assert "0.00 MB in 1 document held out (the end of each)" in corpus.description


@settings(deadline=None)
@given(text=st.text(), fraction=st.floats(0.001, 0.999))
def test_a_cut_falls_between_characters(text: str, fraction: float) -> None:
    at = build.cut_place(text.encode(errors="replace"), fraction)
    assert (text.encode(errors="replace")[:at].decode() + text.encode(errors="replace")[at:].decode()).encode() == (
        text.encode(errors="replace")
    )


def test_bad_lines_are_an_error_with_their_places(lines: Path) -> None:
    (lines / "c.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\noops\n')
    with pytest.raises(ConfigError) as error:
        load_corpus(data(), BYTES)
    assert str(error.value).splitlines() == [
        "data: found 2 texts that cannot be used; reading stopped there; correct or leave out the files, "
        "or skip such texts with data.on_bad=skip",
        "  c.jsonl:2: no key 'text'; keys: txt; set data.text_key",
        "  c.jsonl:3: not JSON at column 1: Expecting value",
    ]
    (lines / "c.jsonl").write_text("oops\n" * 100)
    with pytest.raises(ConfigError, match=r"found 5 texts that cannot be used") as error:
        load_corpus(data(), BYTES)
    assert len(str(error.value).splitlines()) == 6


def test_skipped_lines_are_counted(lines: Path) -> None:
    clean = load_corpus(data(), BYTES)
    (lines / "c.jsonl").write_text('{"txt": 1}\n' + "oops\n" * 6)
    skipped = load_corpus(data(on_bad="skip"), BYTES)
    assert skipped.sha256 == clean.sha256
    assert skipped.description.endswith(
        "; 7 texts skipped (the first: c.jsonl:1: no key 'text'; keys: txt; set data.text_key)"
    )


@pytest.mark.parametrize("content", ["", "oops\n", "x"])
def test_no_text_at_all(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    (tmp_path / "b.txt").write_text("x" if content == "x" else "")
    with pytest.raises(ConfigError, match=r"^data: found no text in 2 files.*give more text$"):
        load_corpus(data(str(tmp_path), on_bad="skip"), BYTES)


def test_tokens_of_a_file_tokenizer(lines: Path, bpe: FileTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = load_corpus(data(), bpe)
    tokenizer, as_bytes = load_tokenizer(bpe), load_corpus(data(), BYTES)
    assert (corpus.train.dtype, corpus.vocab_size) == (np.uint16, 400)
    text = tokenizer.decode(corpus.heldout[:].tolist())
    assert text.replace("<|endoftext|>", "\0").encode() == as_bytes.heldout[:].tobytes()
    assert corpus.num_heldout_bytes == len(as_bytes.heldout)
    assert corpus.heldout_bytes_per_token == len(as_bytes.heldout) / len(corpus.heldout)
    monkeypatch.setattr(build, "_BATCH_BYTES", 1)
    assert load_corpus(data(), bpe).sha256 == corpus.sha256


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_cache_gives_the_same_corpus(lines: Path, bpe: FileTokenizer, kind: str, tmp_path: Path) -> None:
    tokenizer = BYTES if kind == "bytes" else bpe
    cache = tmp_path / ".cache"
    first, second = (load_corpus(data(), tokenizer, cache) for _ in range(2))
    assert isinstance(base_of(second.train[:]), mmap.mmap)
    assert len([*cache.iterdir()]) == 1
    for name in ("train", "heldout"):
        np.testing.assert_array_equal(getattr(first, name)[:], getattr(second, name)[:])
        assert getattr(first, name).dtype == getattr(second, name).dtype
    for name in ("vocab_size", "sha256", "num_train_documents", "num_heldout_bytes", "description"):
        assert getattr(first, name) == getattr(second, name)


def test_cache_notices_changes(lines: Path, tmp_path: Path) -> None:
    cache = tmp_path / ".cache"
    before = load_corpus(data(), BYTES, cache)
    (lines / "a.jsonl").write_text('{"text": "new"}')
    assert load_corpus(data(), BYTES, cache).sha256 == load_corpus(data(), BYTES).sha256 != before.sha256
    assert load_corpus(data(seed=1), BYTES, cache).sha256 == load_corpus(data(seed=1), BYTES).sha256


def test_a_damaged_cache_says_so(lines: Path, tmp_path: Path) -> None:
    cache = tmp_path / ".cache"
    before = load_corpus(data(), BYTES, cache).sha256
    (shard,) = cache.glob("*/*.safetensors")
    shard.write_bytes(b"")
    message = rf"^data: the tokens in {re.escape(str(shard))} are damaged \(.*\); delete that file: it is made anew"
    with pytest.raises(ConfigError, match=message):
        load_corpus(data(), BYTES, cache)
    shard.unlink()
    assert load_corpus(data(), BYTES, cache).sha256 == before
    (shard.parent / "corpus.json").write_text("{}")
    assert load_corpus(data(), BYTES, cache).sha256 == before


def test_a_cache_that_cannot_be_written(lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"^data: tokens cannot be kept in .*/file/.*: .*XDG_CACHE_HOME=DIRECTORY$"):
        load_corpus(data(), BYTES, tmp_path / "file")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "write_shard", full)
    with pytest.raises(ConfigError, match=r"^data: the tokens cannot be written to .*: .*No space left.*; make room"):
        load_corpus(data(), BYTES, tmp_path / ".cache")


def test_tolerance_is_no_other_text(lines: Path, tmp_path: Path) -> None:
    cache = tmp_path / ".cache"
    (lines / "c.jsonl").write_text("oops\n" * 6)
    corpus = load_corpus(data(on_bad="skip"), BYTES, cache)
    (listed,) = cache.glob("*/skipped.txt")
    assert listed.read_text().splitlines()[5] == "c.jsonl:6: not JSON at column 1: Expecting value"
    assert str(listed) in corpus.description
    assert load_corpus(data(on_bad="skip"), BYTES, cache).description == corpus.description
    with pytest.raises(ConfigError, match=r"^data: found 6 texts that cannot be used; .*data\.on_bad=skip\n"):
        load_corpus(data(), BYTES, cache)
    with pytest.raises(ConfigError, match=r"^data: found more than 5 texts .*raise data\.max_bad\n"):
        load_corpus(data(on_bad="skip", max_bad=5), BYTES, cache)
    with pytest.raises(ConfigError, match=r"^data: found more than 5 texts"):
        load_corpus(data(on_bad="skip", max_bad=5), BYTES)


def test_a_held_out_file(lines: Path) -> None:
    corpus = load_corpus(data("a.jsonl", heldout_paths=["b.jsonl"]), BYTES)
    assert len(documents(corpus.train)) == len(documents(corpus.heldout)) == 100
    assert all(text.startswith(b"document a") for text in documents(corpus.train))
    (lines / "empty.txt").write_text("")
    (lines / "none.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"^data: found no held-out text in 2 files; give more text$"):
        load_corpus(data("a.jsonl", heldout_paths=["none.jsonl"]), BYTES)


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_prompts_count_for_nothing(tmp_path: Path, bpe: FileTokenizer, kind: str) -> None:
    rows = [{"ask": f"what is {n}?", "text": f" it is {n}"} for n in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = BYTES if kind == "bytes" else bpe.replace(begin="<pad>")
    corpus = load_corpus(data(str(tmp_path), prompt_key="ask"), tokenizer)
    texts = [len(row["text"]) + 1 for row in rows]
    assert corpus.num_train_bytes + corpus.num_heldout_bytes == sum(texts)
    batches = Batches(corpus.train, batch_size=1, seq_len=len(corpus.train) - 1, seed=0)
    _, targets = batches.batch(0)
    kept = targets[targets != IGNORED]
    if kind == "bytes":
        assert bytes(kept.tolist()).decode().startswith(" it is ")
        assert corpus.train_bytes_per_token == 1
    loaded = load_tokenizer(tokenizer)
    text = loaded.decode(kept.tolist())
    assert "what" not in text
    assert text.count(" it is ") == corpus.num_train_documents
    assert "<pad>" not in text
    assert corpus.train_bytes_per_token == pytest.approx(corpus.num_train_bytes / len(kept))
    assert corpus.boundary == (0 if kind == "bytes" else loaded.begin)


def test_mixtures(lines: Path, tmp_path: Path) -> None:
    one, two = data("a.jsonl"), data("b.jsonl", heldout_fraction=0.5)
    parts = [load_corpus(part, BYTES) for part in (one, two)]
    mixed = load_corpus(MixtureData(sources={"one": one, "two": two}, weights={"one": 3, "two": 1}), BYTES)
    for side in ("train", "heldout"):
        expected = np.concatenate([getattr(part, side)[:] for part in parts])
        np.testing.assert_array_equal(getattr(mixed, side)[:], expected)
    assert [section[:3] for section in mixed.train.sections] == [
        ("one", 0, len(parts[0].train)),
        ("two", len(parts[0].train), len(mixed.train)),
    ]
    assert mixed.num_heldout_bytes == sum(part.num_heldout_bytes for part in parts)
    assert list(mixed.parts) == ["one", "two"]
    assert mixed.parts["two"].sha256 == parts[1].sha256
    assert mixed.description.startswith("75% one (a.jsonl: ")
    by_size = load_corpus(MixtureData(sources={"one": one, "two": two}), BYTES)
    assert [section.weight for section in by_size.train.sections] == [len(part.train) for part in parts]
    assert by_size.sha256 != mixed.sha256
    assert mixed.train_bytes_per_token == mixed.heldout_bytes_per_token == 1


def test_bytes_per_token_of_a_mixture(lines: Path, bpe: FileTokenizer) -> None:
    (lines / "c.txt").write_text("from pathlib import Path\n" * 500)
    sources = {"a": data("a.jsonl"), "c": data("c.txt")}
    parts = {name: load_corpus(part, bpe) for name, part in sources.items()}
    mixed = load_corpus(MixtureData(sources=sources, weights={"a": 1, "c": 1}), bpe)
    assert mixed.train_bytes_per_token == pytest.approx(sum(part.train_bytes_per_token for part in parts.values()) / 2)
    assert mixed.heldout_bytes_per_token == pytest.approx(mixed.num_heldout_bytes / len(mixed.heldout))
