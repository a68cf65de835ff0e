"""A dense model becomes a mixture of experts that computes the same, and then learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from tests.models import ATTENTION, MLP, small_spec, tokens
from zoo.decoder import Decoder, build
from zoo.spec.base import decode
from zoo.spec.model import ModelSpec
from zoo.spec.moe import MoESpec

F64 = torch.float64


def dense(dtype: torch.dtype = F64, **mlp: Any) -> Decoder:
    described = {
        "d_model": 32,
        "vocab_size": 64,
        "attention": ATTENTION,
        "mlp": {**MLP, **mlp},
        "kinds": {"dense": {"mixer": "attention", "ffn": "mlp"}},
        "layers": "3*dense",
        "init": {"std": 0.2, "depth_scaled": False},
    }
    model = build(decode(ModelSpec, described), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("mlp", [{}, {"bias": True}, {"gated": False, "activation": "relu2", "bias": True}], ids=str)
@pytest.mark.parametrize(("num_experts", "top_k", "granularity"), [(6, 2, 1), (4, 4, 1), (8, 4, 2), (12, 6, 3)])
def test_the_first_output_is_the_dense_models(
    mlp: dict[str, Any], num_experts: int, top_k: int, granularity: int
) -> None:
    before, ids = dense(**mlp), tokens(3, 19)
    after = zoo.upcycle(before, num_experts, top_k, granularity=granularity)
    torch.testing.assert_close(after(ids), before(ids), rtol=0, atol=1e-10)
    assert after.spec == zoo.upcycle(
        before.spec, num_experts, top_k, granularity=granularity, router={"arithmetic": "model"}
    )
    moe = after.spec.slots["moe"]
    assert isinstance(moe, MoESpec)
    assert (moe.num_experts, moe.top_k, moe.d_expert) == (num_experts, top_k, 48 // granularity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", [{}, {"score": "sigmoid", "correction_bias": True}, {"score_chosen": True}], ids=str)
def test_other_dtypes_and_routers_agree_to_rounding(dtype: torch.dtype, router: dict[str, Any]) -> None:
    before, ids = dense(dtype), tokens(2, 15)
    after = zoo.upcycle(before, 6, 3, router=router)
    expected = before(ids).float()
    assert {parameter.dtype for parameter in after.parameters()} == {dtype}
    assert (after(ids).float() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.1) * expected.std()


def test_experts_are_copies_and_routers_differ_between_layers() -> None:
    before = dense()
    after = zoo.upcycle(before, 8, 4, granularity=2)
    stack, gate = after.layers[1].ffn.experts.gate_up, before.layers[1].ffn.gate.weight
    for copy in range(4):
        assert torch.equal(torch.cat([stack[2 * copy, :24], stack[2 * copy + 1, :24]]), gate)
    routers = [layer.ffn.router.weight for layer in after.layers]
    assert torch.equal(routers[0][::2], routers[0][1::2])
    assert not torch.equal(routers[0], routers[1])
    assert len(routers[0].unique(dim=0)) == 4
    again, other = (zoo.upcycle(before, 8, 4, granularity=2, seed=seed) for seed in (0, 1))
    assert torch.equal(again.layers[0].ffn.router.weight, routers[0])
    assert not torch.equal(other.layers[0].ffn.router.weight, routers[0])


def test_training_breaks_the_tie_and_lowers_the_loss() -> None:
    model = zoo.upcycle(dense(torch.float32), 4, 2, balance={"aux_loss": 0.01}).train()
    text = torch.arange(33) * torch.arange(1, 5)[:, None] % 61
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = model.loss(text[:, :-1], text[:, 1:])
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.items["cross_entropy"]))
    assert losses[-1] < 0.85 * losses[0]
    stack = model.layers[0].ffn.experts.down
    assert not torch.equal(stack[0], stack[1])


def test_slots_beside_the_mlp_stay() -> None:
    spec = small_spec()
    after = zoo.upcycle(spec, 4, 2)
    assert list(after.slots) == ["local", "attention", "mlp", "moe"]
    assert isinstance(after.slots["mlp"], MoESpec)
    assert after.slots["moe"] == spec.slots["moe"]
    assert zoo.upcycle(zoo.load("qwen3_0_6b"), 8, 2).params().active > zoo.load("qwen3_0_6b").params().total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 6, "top_k": 4, "granularity": 4}, r"upcycle.num_experts: found 6; must be a multiple of gran"),
        ({"num_experts": 10, "top_k": 5, "granularity": 5}, r"upcycle.granularity: found 5; must divide .* \(48\)"),
        ({"num_experts": 2, "top_k": 3}, r"upcycle.top_k: found 3; must be at most num_experts"),
        ({"num_experts": 4, "top_k": 2, "router": {"normalize": False}}, "must sum to 1"),
        ({"num_experts": 4, "top_k": 2, "num_shared_experts": 1}, "must sum to 1"),
        ({"num_experts": 4, "top_k": 2, "d_expert": 8}, "follow from the MLP"),
        ({"num_experts": 4, "top_k": 2, "rooter": {}}, r"upcycle.rooter: .*did you mean router"),
    ],
)
def test_what_would_not_compute_the_same_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        zoo.upcycle(dense().spec, **options)


def test_a_model_without_an_mlp_is_refused() -> None:
    with pytest.raises(zoo.ConfigError, match="mixtral_8x7b has no MLP in a slot of its own"):
        zoo.upcycle(zoo.load("mixtral_8x7b"), 8, 2)
