"""Building shards: the same tokens however often the work was interrupted."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo.data import build, progress
from zoo.data.corpus import load_corpus
from zoo.data.tokenizer import load_tokenizer
from zoo.spec.base import ConfigError
from zoo.spec.data import BytesTokenizer, FilesData, FileTokenizer, StdlibData


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FilesData:
    """600 documents of a line each in several formats, in shards of some 2 kB, tokenized some 300 bytes at a time."""
    monkeypatch.setattr(build, "_SHARD_BYTES", 2000)
    monkeypatch.setattr(build, "_BATCH_BYTES", 300)
    chosen = random.Random(0)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        rows = [{"text": " ".join(chosen.choices("import def class return".split(), k=5))} for _ in range(295)]
        rows[100] = {"txt": "flawed"}
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    for number in range(10):
        (folder / f"c{number}.txt").write_text(f"text {number}")
    return FilesData(paths=(str(folder),), on_bad="skip", heldout_fraction=0.2)


def shards_in(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


def test_shards_are_cut_after_documents(texts: FilesData, bpe: FileTokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    corpus = load_corpus(texts, bpe, cache)
    whole = load_corpus(texts, bpe)
    assert len(shards_in(cache)) > 5
    assert corpus.sha256 == whole.sha256
    assert corpus.description.replace(f"; all: {shards_in(cache)[0].parent}/skipped.txt", "") == whole.description
    assert "2 texts skipped" in corpus.description
    for side in ("train", "heldout"):
        np.testing.assert_array_equal(getattr(corpus, side)[:], getattr(whole, side)[:])


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_tokenization_goes_on(
    texts: FilesData, bpe: FileTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Killed again and again after a random number of calls of the tokenizer; done when it is not."""
    expected = load_corpus(texts, bpe)
    cache, chosen = tmp_path / "cache", random.Random(seed)
    kind = type(load_tokenizer(bpe))
    encode, calls = kind.encode_documents, 0
    for _ in range(100):
        left = chosen.randrange(1, 40)

        def dying(self: Any, documents: Any) -> Any:
            nonlocal left, calls
            left, calls = left - 1, calls + 1
            if left < 0:
                raise KeyboardInterrupt
            return encode(self, documents)

        monkeypatch.setattr(kind, "encode_documents", dying)
        try:
            corpus = load_corpus(texts, bpe, cache)
        except KeyboardInterrupt:
            continue
        break
    monkeypatch.setattr(kind, "encode_documents", encode)
    assert corpus.sha256 == expected.sha256
    assert corpus.num_train_documents == expected.num_train_documents
    assert corpus.num_train_bytes == expected.num_train_bytes
    undisturbed = tmp_path / "undisturbed"
    load_corpus(texts, bpe, undisturbed)
    assert [path.name for path in shards_in(cache)] == [path.name for path in shards_in(undisturbed)]
    assert [path.read_bytes() for path in shards_in(cache)] == [path.read_bytes() for path in shards_in(undisturbed)]


def test_one_lost_shard_is_made_alone(texts: FilesData, bpe: FileTokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    before = load_corpus(texts, bpe, cache)
    lost, kept = shards_in(cache)[2], shards_in(cache)[3]
    content, time_ns = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    assert load_corpus(texts, bpe, cache).sha256 == before.sha256
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == time_ns


def test_a_damaged_shard_is_named_when_it_is_read(texts: FilesData, bpe: FileTokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load_corpus(texts, bpe, cache)
    path = shards_in(cache)[4]
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)
    corpus = load_corpus(texts, bpe, cache)
    with pytest.raises(ConfigError, match=rf"^data: the tokens in {path} are damaged \(.*\); delete that file"):
        (corpus.train[:], corpus.heldout[:])
    path.unlink()
    np.testing.assert_array_equal(load_corpus(texts, bpe, cache).train[:], load_corpus(texts, bpe).train[:])


def test_bad_lines_stop_at_the_end_of_their_shard(texts: FilesData, bpe: FileTokenizer, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data: found 1 text that cannot be used; .*\n  .*a\.jsonl:101: no key 'text'"
    ):
        load_corpus(texts.replace(on_bad="stop"), bpe, tmp_path / "cache")
    assert 0 < len(shards_in(tmp_path / "cache")) < 4
    assert load_corpus(texts, bpe, tmp_path / "cache").sha256 == load_corpus(texts, bpe).sha256


def test_a_tokenizer_that_fails_says_so(texts: FilesData, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0}, unk_token="missing"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"^tokenizer\.path: found .*; cannot encode this text: "):
        load_corpus(texts, FileTokenizer(path=str(tmp_path), separator="<|endoftext|>"))


def test_killed_for_real(bpe: FileTokenizer, tmp_path: Path) -> None:
    """SIGKILL, at whatever it is just doing."""
    code = (
        "import sys; from pathlib import Path; from zoo.data import build; from zoo.data.corpus import load_corpus\n"
        "from zoo.spec.data import *\n"
        "build._SHARD_BYTES = 1 << 18\n"
        "print('started', flush=True)\n"
        "load_corpus(StdlibData(), FileTokenizer(path=sys.argv[1], separator='<|endoftext|>'), Path(sys.argv[2]))\n"
    )
    cache = tmp_path / "cache"
    seen = -1
    for pause in (0.3, 0.6):
        with subprocess.Popen(
            [sys.executable, "-c", code, bpe.path, str(cache)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout
            process.stdout.readline()
            deadline = time.monotonic() + 20
            while len(shards_in(cache)) <= seen + 1 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(pause)
            os.kill(process.pid, signal.SIGKILL)
        assert len(shards_in(cache)) > seen
        seen = len(shards_in(cache))
    assert seen
    assert not list(cache.glob("*/corpus.json"))
    for path in shards_in(cache):
        build.check_all(build.open_shard(path))


def test_two_processes_share_the_work(texts: FilesData, bpe: FileTokenizer, tmp_path: Path) -> None:
    code = (
        "import sys, json; from pathlib import Path\n"
        "from zoo.data import build; from zoo.data.corpus import load_corpus\n"
        "from zoo.spec.base import decode; from zoo.spec.data import *\n"
        "build._SHARD_BYTES = 2000\n"
        "data = decode(FilesData, json.loads(sys.argv[1]))\n"
        "tokenizer = FileTokenizer(path=sys.argv[2], separator='<|endoftext|>')\n"
        "print(load_corpus(data, tokenizer, Path(sys.argv[3])).sha256)\n"
    )
    arguments = [sys.executable, "-c", code, json.dumps(texts.to_dict()), bpe.path, str(tmp_path / "cache")]
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    found = [process.communicate() for process in running]
    assert [out.strip() for out, _ in found] == [load_corpus(texts, bpe).sha256] * 2, found


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_when_it_takes_long(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    load_corpus(StdlibData(), BytesTokenizer())
    assert ("tokenizing: " in shown.getvalue()) is not terminal
    assert ("tokenizing " in shown.getvalue()) is terminal


def test_progress_is_silent_when_it_does_not(capsys: pytest.CaptureFixture[str], texts: FilesData) -> None:
    load_corpus(texts, BytesTokenizer())
    assert capsys.readouterr() == ("", "")
