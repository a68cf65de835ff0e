"""Blocks of multi-token prediction: described, left out, read, written, and held against those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.modeling_layers import MtpModel

import zoo
from tests.hf.checks import SIZES, logits, stored
from tests.hf.test_mixers import TWINS
from zoo.blocks.base import Context
from zoo.decoder import Decoder, build
from zoo.hf import from_pretrained, save_pretrained, spec_from_hf
from zoo.hf.tensors import SINGLE
from zoo.spec import ConfigError, ModelSpec

DEEPSEEK: dict[str, Any] = {
    **SIZES,
    **next(twin for twin in TWINS if twin.name == "deepseek_v3").changes,
    "model_type": "deepseek_v3",
    "num_nextn_predict_layers": 2,
}
NEMOTRON: dict[str, Any] = {
    **SIZES,
    **next(twin for twin in TWINS if twin.name == "nemotron_3").changes,
    "model_type": "nemotron_h",
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
}
QWEN: dict[str, Any] = {
    **SIZES,
    **next(twin for twin in TWINS if twin.name == "qwen3_5").changes,
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
}
CASES = [
    (
        DEEPSEEK,
        {"model.layers.3.enorm.weight", "model.layers.4.shared_head.norm.weight", "model.layers.4.mlp.gate.weight"},
    ),
    (
        NEMOTRON,
        {"mtp.layers.0.eh_proj.weight", "mtp.layers.0.mixer.q_proj.weight", "mtp.layers.1.final_layernorm.weight"},
    ),
    (QWEN, {"mtp.fc.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.layers.0.self_attn.q_proj.weight"}),
]
cases = pytest.mark.parametrize(
    ("config", "names"), CASES, ids=lambda value: value.get("model_type", "") if isinstance(value, dict) else ""
)


def enabled(spec: ModelSpec) -> ModelSpec:
    assert spec.mtp is not None
    return spec.replace(mtp=spec.mtp.replace(enabled=True))


@cases
def test_blocks_are_written_and_read_if_the_description_enables_them(
    config: dict[str, Any], names: set[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build(enabled(spec_from_hf(config)))
    save_pretrained(model, tmp_path)
    assert names <= stored(tmp_path).keys()

    trunk = from_pretrained(tmp_path)
    assert trunk.mtp is None
    tokens = torch.randint(0, 61, (2, 9))
    assert torch.equal(logits(trunk, tokens), logits(model.eval(), tokens))

    whole = from_pretrained(tmp_path, spec=model.spec)
    assert whole.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, whole.state_dict()[name])


@cases
def test_blocks_that_are_described_are_counted_and_not_built(config: dict[str, Any], names: set[str]) -> None:
    spec = spec_from_hf(config)
    without, built = build(spec, "meta"), build(enabled(spec), "meta")
    assert spec.params() == enabled(spec).params()
    assert without.mtp is None
    assert built.mtp is not None
    assert sum(parameter.numel() for parameter in built.mtp.parameters()) == spec.params().mtp


def test_one_block_of_the_largest_release() -> None:
    assert zoo.load("nemotron_3_ultra_550b_a55b").params().mtp == 11_215_609_856


def test_missing_blocks_are_named(tmp_path: Path) -> None:
    model = build(spec_from_hf(DEEPSEEK))
    save_pretrained(model, tmp_path)
    with pytest.raises(ConfigError, match=r"model.layers.3.enorm.weight: missing \(mtp.0.embed_norm.weight\)"):
        from_pretrained(tmp_path, spec=enabled(model.spec))


def test_copies_of_the_embedding_and_the_head_are_left_out(tmp_path: Path) -> None:
    model = build(enabled(spec_from_hf(DEEPSEEK)))
    save_pretrained(model, tmp_path)
    copies = {f"model.layers.3.{name}.weight": torch.zeros(61, 32) for name in ("embed_tokens", "shared_head.head")}
    save_file({**stored(tmp_path), **copies}, tmp_path / SINGLE)
    assert from_pretrained(tmp_path, spec=model.spec).mtp is not None


def beside_the_trunk(mtp: MtpModel, num_layers: int) -> dict[str, torch.Tensor]:
    """The tensors of transformers' blocks, by the names of the hub."""
    held = {}
    for name, tensor in mtp.layers.state_dict().items():
        number, _, rest = name.partition(".")
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        held[f"model.layers.{num_layers + int(number)}.{rest}"] = tensor.clone()
    return held


def further_hidden(model: Decoder, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states after the trunk and after each block, which reads one token further than the one before."""
    assert model.mtp is not None
    context = Context.of(tokens)
    states = [model.hidden(tokens, context)]
    for depth, block in enumerate(model.mtp, 1):
        states.append(block(states[-1], model.embed(tokens.roll(-depth, 1), context), context))
    return states


@torch.no_grad()
def test_hidden_states_equal_those_of_transformers(tmp_path: Path) -> None:
    twin = next(twin for twin in TWINS if twin.name == "deepseek_v3")
    reference = twin.build(dtype=torch.float64)
    reference.config.num_mtp_layers = 2
    mtp = MtpModel(reference, 2).to(torch.float64).eval()
    for parameter in mtp.layers.parameters():
        parameter.normal_(std=0.2)
    reference.save_pretrained(tmp_path)
    save_file({**stored(tmp_path), **beside_the_trunk(mtp, 3)}, tmp_path / SINGLE)

    model = from_pretrained(tmp_path, spec=enabled(from_pretrained(tmp_path).spec))
    tokens, positions = torch.randint(0, 61, (2, 12)), torch.arange(12)[None]
    found = further_hidden(model, tokens)
    expected = reference.model(tokens).last_hidden_state
    assert (found[0] - expected).abs().max() < 1e-9
    for depth in (1, 2):
        shifted = tokens.roll(-depth, 1)
        expected = mtp.forward_layer(depth - 1, expected, positions, None, input_ids=shifted)
        assert (found[depth] - expected).abs().max() < 1e-9
