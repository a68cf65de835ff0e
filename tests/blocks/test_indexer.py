"""The choice of keys against transformers, shared between layers, and in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.blocks.mla_weights import BASE, D, both, hf_class, hf_config, run_hf
from tests.models import MLP, small_model, tokens
from zoo.blocks import indexer as indexer_module
from zoo.blocks.attention import Attention
from zoo.blocks.base import Context, initialize
from zoo.blocks.mla import MLA
from zoo.spec.base import ConfigError
from zoo.spec.norm import NormSpec

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
SHAPES = ((2, 37), (1, 24), (3, 6))


def configs(layout: str, num_heads: int, top_k: int) -> tuple[str, str, Any, dict[str, Any]]:
    """Name, prefix and config of transformers, and our options."""
    name, prefix = ("deepseek_v32", "DeepseekV32") if layout == "half" else ("glm_moe_dsa", "GlmMoeDsa")
    index = {"index_n_heads": num_heads, "index_head_dim": 16, "index_topk": top_k}
    if layout == "interleaved":
        index["indexer_types"] = ["full", "shared"]
    config = hf_config(name, prefix, **ROPE, **index, q_lora_rank=24, num_hidden_layers=2)
    ours = {"num_heads": num_heads, "head_dim": 16, "top_k": top_k, "rope_layout": layout}
    return name, prefix, config, {"rope": {"layout": "interleaved"}, "d_q_latent": 24, "indexer": ours}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("num_heads", "top_k"), [(1, 5), (2, 8), (16, 3)])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@torch.no_grad()
def test_equals_transformers(layout: str, num_heads: int, top_k: int, dtype: torch.dtype) -> None:
    """With few heads many scores are exactly 0: of equal scores the same are chosen."""
    name, prefix, config, ours = configs(layout, num_heads, top_k)
    for shape in SHAPES:
        hf, block = both(name, prefix, config, dtype, **ours)
        x = torch.randn(*shape, D, dtype=dtype)
        expected = run_hf(hf, name, prefix, config, x)
        assert (block(x) - expected).abs().max() < (1e-9 if dtype == torch.float64 else 1e-4) * expected.std()


@torch.no_grad()
def test_reuse_equals_transformers() -> None:
    name, prefix, config, ours = configs("interleaved", 16, 5)
    x, positions = torch.randn(2, 19, D, dtype=torch.float64), torch.arange(19)[None]
    hf, block = both(name, prefix, config, x.dtype, **ours)
    hf_next = hf_class(name, f"{prefix}Attention")(config, 1).double()
    hf_next.load_state_dict({key: item for key, item in hf.state_dict().items() if not key.startswith("indexer")})
    follower = MLA(D, **{**BASE, **ours, "indexer": {**ours["indexer"], "reuse": True}}).double()
    follower.load_state_dict({key: item for key, item in block.state_dict().items() if not key.startswith("indexer")})
    mask = torch.ones(19, 19, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    embeddings = hf_class(name, f"{prefix}RotaryEmbedding")(config)(x, positions)
    y, _, choice = hf(x, embeddings, mask)
    expected = hf_next(y, embeddings, mask, prev_topk_indices=choice)[0]
    context = Context.of(x)
    assert (follower(block(x, context), context) - expected).abs().max() < 1e-9 * expected.std()


def test_no_gradient_reaches_the_indexer() -> None:
    *_, ours = configs("half", 2, 4)
    block, x = MLA(D, **{**BASE, **ours}), torch.randn(2, 9, D, requires_grad=True)
    initialize(block, 0.3, 0.3)
    block(x).sum().backward()
    without = {name for name, parameter in block.named_parameters() if parameter.grad is None}
    assert without == {f"indexer.{name}" for name, _ in block.indexer.named_parameters()}


@torch.no_grad()
def test_rests_until_there_is_a_choice() -> None:
    *_, ours = configs("half", 2, 9)
    block = MLA(D, **{**BASE, **ours})
    initialize(block, 0.3, 0.3)
    x = torch.randn(2, 9, D)
    plain = MLA(D, **{**BASE, **ours, "indexer": None})
    plain.load_state_dict({key: item for key, item in block.state_dict().items() if not key.startswith("indexer")})
    block.indexer = None  # would be missed if it were asked
    assert torch.equal(block(x), plain(x))


@torch.no_grad()
def test_parts_of_the_queries_choose_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, ours = configs("half", 16, 4)
    block, x = MLA(D, **{**BASE, **ours}).double(), torch.randn(2, 30, D, dtype=torch.float64)
    initialize(block, 0.3, 0.3)
    whole = block(x)
    monkeypatch.setattr(indexer_module, "SCORES_AT_ONCE", 2 * 16 * 30 * 7)
    assert (block(x) - whole).abs().max() < 1e-12


INDEXED: dict[str, Any] = {
    "type": "mla",
    **BASE,
    "indexer": {"num_heads": 16, "head_dim": 12, "top_k": 4},
}
REUSED: dict[str, Any] = {**INDEXED, "indexer": {**INDEXED["indexer"], "reuse": True}}
SHARING: dict[str, Any] = {
    "local": INDEXED,
    "attention": REUSED,
    "moe": MLP,
    "layers": "dense sparse sparse dense sparse",
}


def test_recomputation_finds_the_choice_of_each_layer() -> None:
    """Layers are computed again from the last to the first: the newest choice is then another layer's."""
    model = small_model(torch.float64, **SHARING)
    x = tokens(2, 12)
    grads = []
    for recompute in ("none", "layer"):
        model.recompute = recompute
        model.zero_grad()
        model.loss(x, x.roll(-1, 1)).total.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    for first, second in zip(*grads, strict=True):
        assert (first - second).abs().max() < 1e-12


@torch.no_grad()
def test_shared_choices_in_cached_decoding() -> None:
    model, x = small_model(torch.float64, **SHARING), tokens(2, 12)
    expected, states = model(x), model.new_states(2, 12)
    past = 0
    for size in (6, 1, 1, 2, 1, 1):
        context = Context(torch.arange(past, past + size)[None], past)
        y = model(x[:, past : past + size], context, states)
        assert (y - expected[:, past : past + size]).abs().max() < 1e-9
        past += size


def test_reuse_needs_a_layer_that_chooses() -> None:
    model = small_model(**{**SHARING, "layers": "sparse dense"})
    model(tokens(1, 4))  # no more keys than top_k: there is nothing to choose
    with pytest.raises(ConfigError, match=r"indexer\.reuse: found true; no layer before this one makes a choice"):
        model(tokens(1, 5))


HEADS: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "qk_norm": "head",
    "rope": {"fraction": 0.5},
}
BLOCKS: dict[str, Any] = {"num_heads": 2, "head_dim": 12, "block_size": 4, "top_k": 2}


def block_attention(**changes: Any) -> Attention:
    norm = NormSpec(weight="plus_one")
    block = Attention(D, norm=norm, **HEADS, indexer={**BLOCKS, **changes}).double()
    initialize(block, 0.3, 0.3)
    for parameter in block.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return block


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("changes", [{}, {"num_heads": 1, "top_k": 3, "num_local": 2}, {"num_local": 0}], ids=str)
@torch.no_grad()
def test_blocks_equal_transformers(changes: dict[str, Any], dtype: torch.dtype) -> None:
    name, prefix = "minimax_m3_vl", "MiniMaxM3VL"
    block, rule = block_attention(**changes).to(dtype), {"num_local": 1, **BLOCKS, **changes}
    sizes = {"hidden_size": D, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8}
    index = {"n_heads": "num_heads", "head_dim": "head_dim", "block_size": "block_size", "topk_blocks": "top_k"}
    sizes |= {f"index_{key}": rule[field] for key, field in {**index, "local_blocks": "num_local"}.items()}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = hf_class(name, f"{prefix}TextConfig")(
        **sizes, layer_types=["minimax_m3_sparse"], num_hidden_layers=1, rope_parameters=rope
    )
    config._attn_implementation = "sdpa"
    hf = hf_class(name, f"{prefix}Attention")(config, 0).to(dtype)
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
    names |= {f"indexer.{key}": f"indexer.{names[key]}" for key in "qk"}
    weights = {}
    for key, tensor in block.state_dict().items():
        module, _, kind = key.rpartition(".")
        weights[f"{names.get(module, module)}.{kind}"] = tensor
    hf.load_state_dict(weights)
    for shape in ((2, 37), (1, 9), (3, 6)):
        x, positions = torch.randn(*shape, D, dtype=dtype), torch.arange(shape[1])[None]
        embeddings = hf_class(name, f"{prefix}RotaryEmbedding")(config)(x, positions)
        mask = torch.ones(shape[1], shape[1], dtype=torch.bool).tril().expand(shape[0], 1, -1, -1)
        expected = hf(x, embeddings, mask, position_ids=positions)[0]
        assert (block(x) - expected).abs().max() < (1e-9 if dtype == torch.float64 else 1e-4) * expected.std()


@pytest.mark.parametrize("pieces", [[21], [1] * 21, [13, 1, 1, 4, 2]], ids=str)
@torch.no_grad()
def test_blocks_in_cached_decoding_and_behind_padding(pieces: list[int]) -> None:
    block, x, padding = block_attention(), torch.randn(2, 21, D, dtype=torch.float64), torch.tensor([0, 6])
    state, outputs, past = block.new_state(2, 21, x.device, x.dtype), [], 0
    for size in pieces:
        positions = (torch.arange(past, past + size)[None] - padding[:, None]).clamp_min(0)
        outputs.append(block(x[:, past : past + size], Context(positions, past, padding), state))
        past += size
    y = torch.cat(outputs, 1)
    assert torch.isfinite(y).all()
    assert (y[:1] - block(x[:1])).abs().max() < 1e-9
    assert (y[1:, 6:] - block(x[1:, 6:])).abs().max() < 1e-9


@torch.no_grad()
def test_blocks_of_documents_are_apart() -> None:
    block, x = block_attention(), torch.randn(1, 31, D, dtype=torch.float64)
    positions = torch.cat((torch.arange(14), torch.arange(17)))[None]
    y = block(x, Context(positions, documents=torch.tensor([[0] * 14 + [1] * 17])))
    assert (y[:, :14] - block(x[:, :14])).abs().max() < 1e-9
    assert (y[:, 14:] - block(x[:, 14:])).abs().max() < 1e-9


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"indexer": {**BLOCKS, "num_heads": 3}}, r"indexer\.num_heads: found 3; must divide num_heads \(4\)"),
    ({"indexer": {**BLOCKS, "num_local": 3}}, r"indexer\.num_local: found 3; must be at most top_k \(2\)"),
    ({"indexer": {**BLOCKS, "head_dim": 6}}, r"indexer\.head_dim: found 6; must be at least the 8 channels that turn"),
    ({"indexer": BLOCKS, "mask": "sliding", "window": 4}, r"mask: found 'sliding'; must be causal with an indexer"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_mistakes_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Attention(D, **{**HEADS, **options})
