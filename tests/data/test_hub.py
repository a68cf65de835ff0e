"""Data sets of the library datasets, on disk and, without a network, as the Hub would give them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from zoo.data import hub
from zoo.data.corpus import load_corpus
from zoo.data.documents import START, Document, Flaw, Position, find_sources, read_documents
from zoo.spec.base import ConfigError
from zoo.spec.data import BytesTokenizer, HFData

datasets = pytest.importorskip("datasets", reason="needs the extra data: pip install 'moe-zoo[data]'")
BYTES = BytesTokenizer()
TEXTS = [f"row {number}" for number in range(600)]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of two splits as `save_to_disk` writes it, one text of which is missing."""
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    train: dict[str, list[Any]] = {"id": list(range(600)), "text": [*TEXTS[:400], None, *TEXTS[401:]]}
    test = {"id": [0, 1], "text": ["held", "out"]}
    splits = {"train": datasets.Dataset.from_dict(train), "test": datasets.Dataset.from_dict(test)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def read(data: HFData, start: Position = START) -> list[bytes | str]:
    return [
        document.text if isinstance(document, Document) else f"{document.where}: {document.reason}"
        for document in read_documents(data, find_sources(data), start)
    ]


def test_a_data_set_on_disk(saved: Path) -> None:
    found = read(HFData(path="saved"))
    assert found[400] == "saved train:401: 'text' must be a string, not null"
    assert found[:400] + found[401:] == [text.encode() for text in TEXTS[:400] + TEXTS[401:]]
    assert read(HFData(path="saved", split="test")) == [b"held", b"out"]
    assert read(HFData(path="saved"), Position(0, 300)) == found[300:]
    assert read(HFData(path="saved", max_documents=310), Position(0, 300)) == found[300:310]


def test_a_single_split_on_disk(saved: Path) -> None:
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk("single")
    assert read(HFData(path="single")) == [b"one"]
    with pytest.raises(ConfigError, match=r"^data\.split: found 'test'; single is one split, train$"):
        read(HFData(path="single", split="test"))


def test_a_corpus_of_it(saved: Path, tmp_path: Path) -> None:
    data = HFData(path="saved", heldout_split="test", on_bad="skip")
    corpus = load_corpus(data, BYTES, tmp_path / "cache")
    assert corpus.heldout[:].tobytes() == b"held\0out\0"
    assert corpus.num_train_documents == 599
    assert corpus.description.startswith("saved train: 0.00 MB in 599 documents to train on, ")
    assert "1 text skipped (the first: saved train:401: " in corpus.description
    assert load_corpus(data, BYTES, tmp_path / "cache").sha256 == corpus.sha256
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"path": "savd"},
            r"^data\.path: found 'savd'; there is no directory savd; did you mean saved\?; .*",
        ),
        (
            {"path": "org/name"},
            r"^data\.path: found 'org/name'; .* holds saved; to look for it on the Hub: ",
        ),
        ({"path": "saved/train/.."}, ""),
        ({"path": "."}, r"^data\.path: found '\.'; not a directory that save_to_disk .* data=files$"),
        ({"path": "saved", "split": "valid"}, r"^data\.split: found 'valid'; splits of saved: train, test$"),
        (
            {"path": "saved", "text_key": "txt"},
            r"^data\.text_key: found 'txt'; no such column in saved; did you mean",
        ),
        (
            {"path": "saved", "prompt_key": "ask"},
            r"^data\.prompt_key: found 'ask'; no such column in saved; columns: ",
        ),
    ],
)
def test_mistakes(saved: Path, settings: dict[str, str], message: str) -> None:
    data = HFData(**settings)
    if not message:
        assert len(read(data)) == 600
        return
    with pytest.raises(ConfigError, match=message):
        read(data)


def test_a_damaged_directory(saved: Path) -> None:
    (saved / "train" / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^data\.path: found 'saved'; cannot be read as a data set: "):
        read(HFData(path="saved"))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_is_asked_when_that_is_wanted(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        asked.append((path, name, split, revision, streaming))
        found = datasets.Dataset.from_dict({"text": TEXTS, "id": TEXTS})
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = HFData(path="org/name", name="en", revision="v1", split="valid", online=True, streaming=streaming)
    assert read(data) == [text.encode() for text in TEXTS]
    assert read(data, Position(0, 599)) == [TEXTS[-1].encode()]
    assert asked == [("org/name", "en", "valid", "v1", streaming)] * 2


def test_the_commit_on_the_hub_names_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_client = pytest.importorskip("huggingface_hub")

    class Api:
        def dataset_info(self, path: str, revision: str | None) -> Any:
            if path == "org/gone":
                raise OSError("401 Client Error\nmore")
            return type("Info", (), {"sha": f"{path}@{revision}"})

    monkeypatch.setattr(hub_client, "HfApi", Api)
    assert hub.identity(HFData(path="org/name", online=True, revision="v1")) == ["org/name@v1"]
    with pytest.raises(
        ConfigError, match=r"^data\.path: found 'org/gone'; cannot .* from the Hub: OSError: 401 Cl.*Error$"
    ):
        hub.identity(HFData(path="org/gone", online=True))


def test_without_the_library(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"^data\.type: found 'hf'; needs the package datasets; pip install"):
        read(HFData(path="saved"))


def test_a_null_is_a_flaw(saved: Path) -> None:
    data = HFData(path="saved", prompt_key="text", text_key="id")
    first = next(iter(read_documents(data, find_sources(data))))
    assert isinstance(first, Flaw)
    assert first.reason == "'id' must be a string, not a number"
