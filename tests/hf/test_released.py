"""Released models: the file in conf/model says what the released config.json says."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.hf import spec_from_hf, spec_to_hf
from zoo.hf.config import family_of
from zoo.spec import ModelSpec

# Verbatim config.json files with the parameters that transformers 5.23 counts on the meta device.
RECORDS = json.loads((Path(__file__).parent / "released.json").read_text())
MODELS = Path(__file__).parents[2] / "conf" / "model"

load = functools.cache(zoo.load)
released = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])


def test_the_records_are_many() -> None:
    assert len(RECORDS) >= 115


@released
def test_the_yaml_is_the_released_config(record: dict[str, Any]) -> None:
    spec = load(record["name"])
    assert nameless(spec) == nameless(spec_from_hf(record["hf_config"]))


@released
def test_the_card_says_the_context_length(record: dict[str, Any]) -> None:
    card = load(record["name"]).card
    assert card is not None
    keys = ("max_position_embeddings", "model_max_length", "n_positions", "max_seq_len")
    assert card.context == next(record["hf_config"][key] for key in keys if key in record["hf_config"])


@released
def test_the_count_is_that_of_transformers(record: dict[str, Any]) -> None:
    params = load(record["name"]).params()
    assert params.total == record["total"]
    assert params.active == record["active"]


@released
def test_the_yaml_is_short(record: dict[str, Any]) -> None:
    assert len((MODELS / f"{record['name']}.yaml").read_text().splitlines()) <= 30


@released
def test_the_config_survives_both_ways(record: dict[str, Any]) -> None:
    spec = load(record["name"])
    written = spec_to_hf(spec)
    assert written["architectures"] == [RENAMED.get(record["hf_architecture"], record["hf_architecture"])]
    assert family_of(written) is family_of(record["hf_config"])
    assert nameless(spec_from_hf(written)) == nameless(spec)
    # What the released file says otherwise, or says and this one does not, changes nothing.
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}
    otherwise = {key: value for key, value in record["hf_config"].items() if written.get(key) != value}
    assert nameless(spec_from_hf({**written, **otherwise})) == nameless(spec)
    assert tokens.isdisjoint(key for key, value in written.items() if value is not None)


# Code on the hub, and a class of transformers that is a part of another one.
RENAMED = {
    "ArcticForCausalLM (remote code)": "ArcticForCausalLM",
    "BailingMoeV2ForCausalLM (remote code)": "BailingMoeV2ForCausalLM",
    "Step3p7TextModel": "Step3p5ForCausalLM",
}


def nameless(spec: ModelSpec) -> ModelSpec:
    return spec.replace(name="", card=None)


def test_a_model_without_a_hugging_face_config_is_counted() -> None:
    params = load("grok_1").params()
    assert params.total == 315_684_820_992
    assert params.active == 83_756_587_008
