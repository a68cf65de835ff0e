"""The decoder: wiring, objective, recomputation, multi-token prediction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models import small_model, small_spec, tokens
from zoo.blocks.base import Context
from zoo.decoder import IGNORED, Decoder, build, cast_parameters


def double(**changes: Any) -> Decoder:
    return small_model(torch.float64, **changes)


def test_pre_norm_is_its_formula() -> None:
    model, ids = double(), tokens(2, 9)
    x = model.embed.weight[ids]
    for layer in model.layers:
        x = x + layer.mixer(layer.mixer_norm(x))
        x = x + layer.ffn(layer.ffn_norm(x))
    torch.testing.assert_close(model(ids), model.norm(x) @ model.head.weight.T)


def test_post_norm_is_its_formula() -> None:
    model, ids = double(norm_placement="post"), tokens(2, 9)
    x = model.embed.weight[ids]
    for layer in model.layers:
        x = x + layer.mixer_post_norm(layer.mixer(x))
        x = x + layer.ffn_post_norm(layer.ffn(x))
    torch.testing.assert_close(model(ids), model.norm(x) @ model.head.weight.T)


def test_sandwich_norms_and_scalars_are_their_formulas() -> None:
    model = double(
        norm_placement="sandwich",
        residual_scale=0.3,
        embedding={"scale": 2.5},
        head={"tied": True, "scale": 0.7, "softcap": 2.0},
        layer_scale=True,
    )
    ids = tokens(2, 9)
    x = 2.5 * model.embed.weight[ids]
    for factor, layer in zip((0.9, 1.2), model.layers, strict=True):
        layer.scale.fill_(factor)
        x = x + 0.3 * layer.mixer_post_norm(layer.mixer(layer.mixer_norm(x)))
        x = factor * (x + 0.3 * layer.ffn_post_norm(layer.ffn(layer.ffn_norm(x))))
    logits = 0.7 * model.norm(x) @ model.embed.weight.T
    assert "head.weight" not in model.state_dict()
    torch.testing.assert_close(model(ids), 2 * torch.tanh(logits / 2), rtol=1e-6, atol=1e-6)


def test_layers_without_mixer_or_ffn_and_a_channel_mixer_beside() -> None:
    kinds = {"mix": {"mixer": "attention"}, "think": {"ffn": "moe"}, "both": {"mixer": "local", "beside": "mlp"}}
    model, ids = double(kinds=kinds, layers="mix think both"), tokens(2, 9)
    mix, think, both = model.layers
    x = model.embed.weight[ids]
    x = x + mix.mixer(mix.mixer_norm(x))
    x = x + think.ffn(think.ffn_norm(x))
    x = x + both.mixer(both.mixer_norm(x)) + both.beside(both.beside_norm(x))
    torch.testing.assert_close(model(ids), model.norm(x) @ model.head.weight.T)


def test_square_root_scale_is_rounded_to_the_weights() -> None:
    model = small_model(torch.bfloat16, embedding={"scale": "sqrt_d_model"})
    expected = model.embed.weight[:1] * torch.tensor(math.sqrt(32)).bfloat16()
    assert torch.equal(model.embed(torch.tensor([[0]]), Context(torch.tensor([[0]])))[0], expected)


def test_learned_positions_are_added() -> None:
    model = double(embedding={"positions": 16})
    moved = Context(torch.tensor([[3, 4, 5]]))
    ids = tokens(1, 3)
    expected = model.embed.weight[ids] + model.embed.positions[3:6]
    torch.testing.assert_close(model.embed(ids, moved), expected)


def test_no_token_sees_the_future() -> None:
    model, ids = double(), tokens(1, 12)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 64
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_objective_is_cross_entropy_plus_weighted_terms() -> None:
    model, ids, targets = double(), tokens(2, 9), tokens(2, 9, seed=1)
    targets[0, :4] = IGNORED
    losses = model.loss(ids, targets)
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(losses.items["cross_entropy"], expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert losses.num_tokens == 14
    others = {name: value for name, value in losses.items.items() if name != "cross_entropy"}
    assert len(others) == 1
    (balance,) = others.values()
    torch.testing.assert_close(losses.total, expected + 0.01 * balance, rtol=1e-6, atol=1e-6, check_dtype=False)


def test_no_target_at_all_is_no_loss() -> None:
    losses = small_model().loss(tokens(1, 4), torch.full((1, 4), IGNORED))
    assert losses.items["cross_entropy"] == 0
    assert losses.num_tokens == 0


def test_recomputation_changes_nothing() -> None:
    ids, targets = tokens(2, 9), tokens(2, 9, seed=1)
    found = []
    for recompute in ("none", "layer"):
        torch.manual_seed(0)
        model = double()
        model.recompute = recompute
        losses = model.loss(ids, targets)
        losses.total.backward()
        counts = [moe.tokens_per_expert.clone() for moe in model.moe_layers().values()]
        found.append((losses.total, [p.grad for p in model.parameters()], counts))
    (total, grads, counts), (again, grads_again, counts_again) = found
    assert torch.equal(total, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert [int(count.sum()) for count in counts] == [36]
    assert torch.equal(counts[0], counts_again[0])


@pytest.mark.parametrize("shared", [True, False])
def test_multi_token_prediction_is_its_formula(shared: bool) -> None:
    mtp = {"layers": "sparse", "depth": 2, "shared": shared, "enabled": True, "loss_weight": 0.3}
    model = double(mtp=mtp).eval()
    ids, targets = tokens(2, 9), tokens(2, 9, seed=1)
    trunk = hidden = model.hidden(ids, Context.of(ids))
    expected = []
    for depth in (1, 2):
        block = model.mtp[0 if shared else depth - 1]
        embedded = model.embed.weight[torch.cat((ids[:, depth:], ids[:, :depth]), 1)]
        x = block.proj(torch.cat((block.embed_norm(embedded), block.hidden_norm(hidden)), -1))
        hidden = block.norm(block.layers[0](x, Context.of(x)))
        logits = hidden[:, :-depth] @ model.head.weight.T
        expected.append(F.cross_entropy(logits.flatten(0, 1), targets[:, depth:].flatten()))
    losses = model.loss(ids, targets)
    close = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(losses.items["mtp"], torch.stack(expected).mean(), **close)
    plain = F.cross_entropy((trunk @ model.head.weight.T).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(losses.total, plain + 0.3 * losses.items["mtp"], **close)
    assert len(model.mtp) == (1 if shared else 2)


def test_multi_token_prediction_learns() -> None:
    mtp = {"layers": "dense", "depth": 1, "enabled": True}
    model = small_model(std=0.05, mtp=mtp)
    ids = torch.arange(12).repeat(4, 1) + torch.arange(4)[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    seen = []
    for _ in range(30):
        losses = model.loss(ids[:, :-1], ids[:, 1:])
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(losses.items["mtp"]))
    assert seen[-1] < 0.5 * seen[0]


def test_described_but_not_enabled_mtp_has_no_weights() -> None:
    assert build(small_spec(mtp={"layers": "dense"}), device="meta").mtp is None


def test_start_follows_the_description() -> None:
    torch.manual_seed(0)
    model = build(small_spec(d_model=256, init={"std": 0.05}))
    assert model.embed.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert model.layers[0].mixer.q.weight.std().item() == pytest.approx(0.05, rel=0.1)
    writes = {"layers.0.mixer.out.weight", "layers.0.ffn.down.weight", "layers.1.ffn.experts.down"}
    for name in writes:  # four branches write to the residual stream
        assert model.get_parameter(name).std().item() == pytest.approx(0.05 / 2, rel=0.1)
    assert torch.equal(model.norm.weight, torch.ones(256))


def test_meta_device_holds_shapes_alone_and_dtype_spares_buffers() -> None:
    assert {parameter.device.type for parameter in build(small_spec(), device="meta").parameters()} == {"meta"}
    sigmoid = {"type": "top_k", "score": "sigmoid", "correction_bias": True}
    moe = {"type": "moe", "num_experts": 6, "top_k": 2, "d_expert": 16, "router": sigmoid}
    model = build(small_spec(moe=moe), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.layers[1].ffn.router.correction_bias.dtype == torch.float32
    assert not model.layers[1].ffn.router.correction_bias.any()


def test_casting_keeps_what_is_frozen() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    cast_parameters(layer, torch.float64)
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (True, False)
    assert layer.weight.dtype == layer.bias.dtype == torch.float64


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [3, 1, 6]])
def test_cached_passes_equal_the_whole(pieces: list[int]) -> None:
    model, ids = double().eval(), tokens(2, 10)
    states, past, rows = model.new_states(2, 10), 0, []
    for piece in ids.split(pieces, 1):
        rows.append(model(piece, Context(torch.arange(past, past + piece.shape[1])[None], past), states))
        past += piece.shape[1]
    torch.testing.assert_close(torch.cat(rows, 1), model(ids), rtol=0, atol=1e-9)
