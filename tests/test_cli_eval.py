"""`zoo eval` on a small checkpoint: the figures are those of the plain loss, and mistakes are named."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import zoo
from zoo.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("eval")
    spec = zoo.load("qwen3_0_6b", "model_scale=tiny", "model.vocab_size=256")
    zoo.save_pretrained(zoo.build(spec), folder / "checkpoint")
    (folder / "one.txt").write_text("some words to predict")
    (folder / "two.jsonl").write_text('{"text": "a line"}\n{"text": "another line"}\n')
    return folder


def test_figures_are_those_of_the_plain_loss(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"text={place / name}" for name in ("one.txt", "two.jsonl")]
    out = place / "found.json"
    assert main(["eval", str(place / "checkpoint"), *texts, "tokenizer=bytes", f"out={out}"]) == 0
    told = capsys.readouterr().out
    assert [word in told for word in ("one.txt", "two.jsonl", "all", "bits/byte")] == [True] * 4
    found = json.loads(out.read_text())["texts"]
    text = (place / "one.txt").read_bytes()
    ids = torch.tensor([[0, *text]])
    with torch.no_grad():
        loss = zoo.from_pretrained(place / "checkpoint").loss(ids[:, :-1], ids[:, 1:]).items["cross_entropy"]
    one = found[str(place / "one.txt")]
    assert (one["documents"], one["tokens"], one["bytes"]) == (1, len(text), len(text))
    assert one["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert one["bits_per_byte"] == pytest.approx(float(loss) / math.log(2), rel=1e-5)
    assert found["all"]["documents"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "text: missing; name a file to score"),
        (["text=nowhere.txt"], "text: "),
        (["text={place}/one.txt", "stride=9", "seq_len=4"], "stride: found 9; must be at most seq_len, 4"),
        pytest.param(
            ["text={place}/one.txt", "tasks=arc", "tasks=none"],
            "tasks: needs the package lm_eval",
            marks=pytest.mark.skipif(find_spec("lm_eval") is not None, reason="it is installed"),
        ),
        (["text={place}/one.txt", "strid=3"], "strid: found 3; unknown key"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [word.format(place=place) for word in words]
    assert main(["eval", str(place / "checkpoint"), *asked, "tokenizer=bytes"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert "Traceback" not in told
