"""Released models: the file in conf/model says what the released config.json says."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.hf import spec_from_hf, spec_to_hf

# Verbatim config.json files with the parameters that transformers 5.23 counts on the meta device.
RECORDS = json.loads((Path(__file__).parent / "released.json").read_text())
MODELS = Path(__file__).parents[2] / "conf" / "model"

load = functools.cache(zoo.load)
released = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])


def test_the_records_are_many() -> None:
    assert len(RECORDS) >= 19


@released
def test_the_yaml_is_the_released_config(record: dict[str, Any]) -> None:
    spec = load(record["name"])
    assert spec.replace(name="", card=None) == spec_from_hf(record["hf_config"]).replace(name="", card=None)


@released
def test_the_card_says_the_context_length(record: dict[str, Any]) -> None:
    card = load(record["name"]).card
    assert card is not None
    assert card.context == record["hf_config"]["max_position_embeddings"]


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
    assert written["architectures"] == [record["hf_architecture"]]
    assert written["model_type"] == record["hf_config"]["model_type"]
    assert spec_from_hf(written).replace(name="", card=None) == spec.replace(name="", card=None)
    # What the released file says is said again, but for what is no part of a model's description.
    left_out = {key for key, value in record["hf_config"].items() if written.get(key) != value}
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}
    without_effect = {"attention_dropout", "output_router_logits", "pretraining_tp", "clip_qkv", "max_window_layers"}
    never_used = {"intermediate_size"} if "mlp" not in spec.slots else set()
    class_defaults = {"qkv_bias", "use_qk_norm", "shared_expert_intermediate_size"}
    assert left_out <= tokens | without_effect | never_used | class_defaults | {"sliding_window"}
