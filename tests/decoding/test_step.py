"""The compiled step against the eager one: every twin, every option of attention, both dtypes, and when it declines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import ATTENTION, MOE, small_model, tokens
from tests.test_twins import twins
from zoo.blocks.base import Context
from zoo.decoder import Decoder, build
from zoo.decoding import CompiledStep, compiled_step
from zoo.generate import _context
from zoo.native.library import library
from zoo.spec.base import ConfigError

PROMPT, NEW = 40, 5  # longer than the windows of twins


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if library() is None:
        pytest.skip("no C++ compiler here")


def stirred(model: Decoder) -> Decoder:
    """Biases, sinks and norms that have left their start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


def logits(model: Decoder, compiled: bool, padding: Tensor | None, rows: int = 2) -> tuple[Tensor, CompiledStep | None]:
    """Of the last NEW tokens [NEW, b, vocab], passed one at a time after a prompt."""
    ids = tokens(rows, PROMPT + NEW, model.spec.vocab_size)
    states, found = model.new_states(rows, PROMPT + NEW), []
    with torch.no_grad():
        model.hidden(ids[:, :PROMPT], _context(0, ids[:, :PROMPT], padding), states)
        step = compiled_step(model, states, PROMPT, NEW, rows, padding) if compiled else None
        assert not isinstance(step, str)
        for past in range(PROMPT, PROMPT + NEW):
            context = _context(past, ids[:, past : past + 1], padding)
            if step is None:
                found.append(model.logits(model.hidden(ids[:, past : past + 1], context, states)[:, 0]))
            else:
                found.append(step(ids[:, past], context).clone())
    return torch.stack(found).to(torch.float32), step


def assert_agrees(model: Decoder, padding: Tensor | None = None, rows: int = 2) -> CompiledStep:
    expected, _ = logits(model, False, padding, rows)
    found, step = logits(model, True, padding, rows)
    assert step is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.std()))
    return step


@pytest.mark.parametrize("name", twins())
def test_every_twin_decodes_as_it_does_eagerly(name: str) -> None:
    torch.manual_seed(0)
    assert_agrees(stirred(build(twins()[name])), torch.tensor([0, 3]))


OPTIONS: list[dict[str, Any]] = [
    {"qkv_bias": True, "out_bias": True, "qkv_clip": 0.3},
    {"qk_norm": "head", "v_head_dim": 12},
    {"qk_norm": "full", "v_norm": True},
    {"qk_norm": "full", "qk_norm_after_rope": True},
    {"qk_norm": "head", "qk_norm_after_rope": True, "qk_norm_weight": "none"},
    {"rope": {"layout": "interleaved", "fraction": 0.5}},
    {"rope": {"layout": "interleaved", "arithmetic": "complex"}},
    {"rope": None, "shared_kv": True, "value_scale": 0.7},
    {"query_scale": {"beta": 0.5, "original_context": 16}},
    {"mask": "sliding", "window": 7},
    {"mask": "sliding", "window": 1},
    {"mask": "chunked", "window": 7},
    {"softcap": 2.0, "sink": True, "scale": 0.9},
    {"gate": "element"},
    {"gate": "head", "gate_activation": "softplus"},
    {"num_kv_heads": 4},
    {"num_kv_heads": 1, "head_dim": 18},
]


@pytest.mark.parametrize("padding", [None, [0, 9, 3]], ids=["whole", "padded"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_has_every_option(options: dict[str, Any], padding: list[int] | None) -> None:
    model = stirred(small_model(attention={**ATTENTION, **options}))
    step = assert_agrees(model, None if padding is None else torch.tensor(padding), rows=3)
    assert step.num_python == 0


ROUTERS: list[dict[str, Any]] = [
    {"score": "sigmoid", "correction_bias": True, "route_scale": 2.5, "normalize": False},
    {"score": "sqrt_softplus", "expert_scale": True, "normalize_eps": 0.1},
    {"score_chosen": True, "logit_bias": True},
    {"num_groups": 3, "top_groups": 2, "group_score": "max"},
    {"num_groups": 3, "top_groups": 2, "correction_bias": True},
    {"weigh": "input", "input_norm": True},
]
MOES: list[dict[str, Any]] = [
    *({"router": {"type": "top_k", **router}} for router in ROUTERS),
    {"num_shared_experts": 1, "shared_gate": True, "combine": "fp32"},
    {"d_latent": 20, "latent_norm": True},
    {"activation": "relu2", "gated": False, "bias": True},
    {"activation": "clamped_swish", "activation_limit": 0.5, "bias": True},
    {"activation": "clamped_silu", "activation_limit": 0.5},
    {"activation": "silu_clamped", "activation_limit": 0.2},
    {"activation": "situ"},
    {"activation": "gelu"},
    {"activation": "gelu_tanh", "d_expert": 19},
]


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("options", MOES, ids=str)
def test_experts_have_every_option(options: dict[str, Any], rows: int) -> None:
    step = assert_agrees(stirred(small_model(moe={**MOE, **options})), rows=rows)
    assert step.num_python == 0


def test_blocks_that_the_kernels_do_not_know_run_as_they_are() -> None:
    sparse_mixer = {**MOE, "router": {"type": "sparse_mixer"}}
    assert assert_agrees(stirred(small_model(moe=sparse_mixer))).num_python == 1
    model, calls = stirred(small_model()), []
    model.layers[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    assert assert_agrees(model).num_python == 1
    assert len(calls) == 2 + 2 * NEW


@pytest.mark.parametrize("rows", [1, 8])
def test_bf16_weights_are_multiplied_in_fp32(rows: int) -> None:
    """Nearer to fp32 arithmetic on the same weights than torch's bf16: only keys and values are rounded."""
    model = stirred(small_model(std=0.1)).to(torch.bfloat16)
    exact, _ = logits(stirred_copy(model), False, None, rows)
    found, _ = logits(model, True, None, rows)
    eager, _ = logits(model, False, None, rows)
    assert (found - exact).norm() < 0.5 * (eager - exact).norm()
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05 * float(exact.std()))


def stirred_copy(model: Decoder) -> Decoder:
    """The same numbers in fp32."""
    copy = build(model.spec).eval()
    copy.load_state_dict({name: value.to(torch.float32) for name, value in model.state_dict().items()})
    return copy


def test_no_memory_is_made_for_a_token() -> None:
    model, ids = small_model().eval(), tokens(2, 10)
    states = model.new_states(2, 20)
    with torch.no_grad():
        model.hidden(ids, Context.of(ids), states)
        step = compiled_step(model, states, 10, 10, 2, None)
        assert not isinstance(step, str)
        places = {step(ids[:, 0], _context(past, ids[:, :1], None)).data_ptr() for past in range(10, 20)}
    assert len(places) == 1


def test_what_cannot_be_compiled_says_why() -> None:
    many, wide = small_model(), small_model(torch.float64)
    for model, rows, reason in ((many, 17, "at most 16 texts"), (wide, 1, "fp32 or bf16")):
        model.decoding = "compiled"
        with pytest.raises(ConfigError, match=f"decode: found 'compiled'; not possible here: .*{reason}"):
            model.generate(tokens(rows, 3), 2)
        model.decoding = "auto"
        assert model.generate(tokens(rows, 3), 2).shape == (rows, 5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.9},
        {"stop": [3, 7, 11, 60]},
        {"padding": torch.tensor([0, 2, 4])},
    ],
    ids=str,
)
def test_text_is_the_same(options: dict[str, Any]) -> None:
    model, ids = stirred(small_model()), tokens(3, 6)
    texts = []
    for model.decoding in ("eager", "compiled"):
        drawn = {"generator": torch.Generator().manual_seed(1)} if "temperature" in options else {}
        texts.append(model.generate(ids, 30, **options, **drawn))
    assert torch.equal(*texts)


def test_text_is_that_of_transformers(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    import zoo
    from zoo.spec.twin import shrink

    torch.manual_seed(0)
    model = stirred(build(shrink(zoo.load("qwen3_30b_a3b"))))
    zoo.save_pretrained(model, tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(4, 9, model.spec.vocab_size)
    expected = other.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    model.decoding = "compiled"
    assert torch.equal(model.generate(ids, 40), expected)
