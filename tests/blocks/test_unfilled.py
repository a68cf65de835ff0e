"""Modules without numbers: nothing is filled on the way, and what is made otherwise still is."""

from __future__ import annotations

import torch
from torch import nn

import zoo
from zoo.blocks.unfilled import unfilled


def test_starts_are_left_out() -> None:
    real = torch.zeros(3)
    with unfilled():
        layer = nn.Linear(4, 3)
        nn.init.normal_(real)
        nn.init.ones_(real)
    assert layer.weight.is_meta
    assert not real.any()
    assert nn.init.ones_(real).all()


def test_a_built_model_has_its_start_and_a_giant_its_shapes() -> None:
    model = zoo.build("tiny_moe")
    assert all(weight.any() for name, weight in model.named_parameters() if "norm" in name)
    spec = zoo.load("deepseek_v3")
    giant = zoo.build(spec, device="meta")
    assert sum(weight.numel() for weight in giant.parameters()) == spec.params().total
