"""Norms against the formulas of their papers and against transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from zoo.blocks.norm import Norm
from zoo.spec.norm import NormSpec

REFERENCES = {"plain": LlamaRMSNorm, "fp32": Gemma4RMSNorm, "wide": Olmo2RMSNorm, "plus_one": GemmaRMSNorm}


def filled(spec: NormSpec, dtype: torch.dtype) -> Norm:
    norm = Norm(24, spec).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.3)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight", REFERENCES)
def test_rms_norms_equal_transformers(weight: str, dtype: torch.dtype) -> None:
    norm = filled(NormSpec(weight=weight, eps=1e-5), dtype)
    reference = REFERENCES[weight](24, eps=1e-5).to(dtype)
    reference.weight.data.copy_(norm.weight)
    x = (3 * torch.randn(2, 5, 24)).to(dtype)
    expected = reference(x)
    assert norm(x).dtype == expected.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 0  # fp32 takes a fused path; the others are the same to the bit
    torch.testing.assert_close(norm(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_its_formula(bias: bool) -> None:
    norm = filled(NormSpec(type="layer", bias=bias, eps=1e-3), torch.float64)
    x = torch.randn(4, 24, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected + norm.bias if bias else expected)


def test_without_weight_the_mean_square_is_one() -> None:
    norm = Norm(24, NormSpec(weight="none", eps=1e-12))
    assert list(norm.parameters()) == []
    y: Tensor = norm(torch.randn(7, 24))
    torch.testing.assert_close(y.pow(2).mean(-1), torch.ones(7))


@pytest.mark.parametrize("weight", ["plain", "plus_one", "fp32", "wide", "none"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_fresh_weights_are_neutral(kind: str, weight: str) -> None:
    norm = Norm(24, NormSpec(type=kind, weight=weight))
    norm.init_weights(0.02, 0.02)
    x = torch.randn(3, 24)
    torch.testing.assert_close(norm(x), Norm(24, NormSpec(type=kind, weight="none"))(x))
