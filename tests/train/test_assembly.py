"""What is decided for a run before its first step, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.runs import small_run
from zoo.data.batches import heldout_rows
from zoo.data.ngram import TrigramBaseline
from zoo.hardware import Speed
from zoo.spec.base import ConfigError
from zoo.train import assembly
from zoo.train.assembly import Assembly, assemble

SLOW_BF16 = {"fp32": 0.16, "bf16": 0.003}
FAST_BF16 = {"fp32": 0.2, "bf16": 0.42}


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def assembled(*overrides: str, tflops: dict[str, float] = SLOW_BF16, compute: str | None = None) -> Assembly:
        monkeypatch.setattr(assembly, "measure", lambda chip: Speed(tflops, 10.0))
        decided = {"compute": compute, "micro_batch": 4, "recompute": "none"} if compute else None
        return assemble(small_run(tmp_path, *overrides), decided)

    return assembled


@pytest.mark.parametrize(
    ("overrides", "tflops", "compute", "reason"),
    [
        (["precision=auto"], SLOW_BF16, "fp32", "bf16 matrices at 0.019 times the speed of fp32"),
        (["precision=auto"], FAST_BF16, "bf16", "bf16 matrices 2.1 times as fast as fp32"),
        (["precision=auto"], {"fp32": 0.2, "bf16": 0.28}, "fp32", "at 1.4 times the speed"),
        (["precision=auto"], {"fp32": 0.2}, "fp32", "bf16 matrices not at all"),
        (["precision=auto", "precision.weights=bf16"], SLOW_BF16, "bf16", "so are the weights"),
        (["precision=bf16"], SLOW_BF16, "bf16", None),
        (["precision=fp32"], FAST_BF16, "fp32", None),
    ],
)
def test_precision_follows_the_machine_unless_it_is_named(
    prepare: Any, overrides: list[str], tflops: dict[str, float], compute: str, reason: str | None
) -> None:
    parts = prepare(*overrides, tflops=tflops)
    lines = [line for line in parts.choices if line.startswith("precision")]
    assert parts.compute == compute
    assert len(lines) == (reason is not None)
    assert all(line.startswith(f"precision {compute}: ") and reason and reason in line for line in lines)
    with parts.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    autocasts = compute == "bf16" and "precision.weights=bf16" not in overrides
    assert product.dtype == (torch.bfloat16 if autocasts else torch.float32)
    assert parts.peak_flops_per_s == (tflops[compute] * 1e12 if compute in tflops else None)


def test_weights_and_buffers_have_their_dtypes(prepare: Any) -> None:
    model = prepare("precision=bf16", "precision.weights=bf16", "model/moe/router=sigmoid").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {moe.router.correction_bias.dtype for moe in model.moe_layers().values()} == {torch.float32}


def test_kernels_reach_the_experts(prepare: Any) -> None:
    for kernels, backend in (("reference", "loop"), ("cpu", "auto"), ("auto", "auto")):
        parts = prepare(f"kernels={kernels}")
        assert {moe.experts.backend for moe in parts.model.moe_layers().values()} == {backend}
        assert any(line.startswith("experts grouped: ") for line in parts.choices) == (backend == "auto")


def test_equal_seeds_give_equal_weights(prepare: Any) -> None:
    first, second, other = (prepare(f"train.seed={seed}").model.head.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_baseline_is_scored_on_what_evaluations_read(prepare: Any) -> None:
    parts = prepare("train.eval_tokens=128")
    rows = heldout_rows(parts.corpus.heldout, 16, 128)
    assert parts.baselines == {"order-2 bytes": TrigramBaseline.fit(parts.corpus.train).bits_per_byte(rows)}


def test_other_tokens_than_bytes_have_no_byte_baseline(prepare: Any, tmp_path: Path, monkeypatch: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "x": 1, "y": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    parts = prepare("tokenizer=file", f"tokenizer.path={tmp_path}", "tokenizer.separator='<eos>'")
    assert parts.baselines == {}
    assert set(np.unique(parts.corpus.train[:])) <= {0, 1, 2, 3}
    assert set(parts.sample("x y").replace(" ", "")) <= set("xy?")  # no row beyond the tokenizer's is decoded
    assert len(list((tmp_path / "cache/zoo/corpora").iterdir())) == 1


def test_flops_are_those_of_the_model_and_the_machine_is_told_in_a_line(prepare: Any) -> None:
    parts = prepare("train.seq_len=32")
    assert parts.forward_flops_per_token == parts.model.spec.flops(32).total
    assert parts.device == torch.device("cpu")
    assert parts.hardware.endswith(" GiB, matrix multiplication at 0.16 TFLOP/s in fp32 (measured)")


def test_a_sample_is_drawn_from_the_seed(prepare: Any) -> None:
    parts = prepare("train.sample_tokens=12")
    first = parts.sample("def ")
    torch.rand(7)
    assert parts.sample("def ") == first
    assert 0 < len(first.encode()) <= 3 * 12  # bytes that are no UTF-8 are shown by a character of three


def test_a_sample_stays_within_learned_positions(prepare: Any) -> None:
    parts = prepare("+model.embedding.positions=20", "train.sample_tokens=20", "train.sample_temperature=0")
    assert len(parts.sample("x" * 15)) <= 5
    assert parts.sample("x" * 20) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_machine_that_is_not_here_is_refused(prepare: Any) -> None:
    with pytest.raises(ConfigError, match=r"^hardware: found 'rtx4090'"):
        prepare("hardware=rtx4090")
