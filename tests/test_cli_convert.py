"""`zoo convert`: what it writes is the same model, and it says so only when that is so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo
from tests.hf.checks import SIZES, Twin, logits
from tests.models import small_model, tokens
from tests.train.runs import small_run
from zoo.cli import main
from zoo.hf import convert as converting
from zoo.hf.tensors import INDEX, SINGLE
from zoo.train.checkpoint import save_checkpoint

MIXTRAL = Twin("", "mixtral", {"num_local_experts": 5})
DEEPSEEK = Twin(
    "",
    "deepseek_v3",
    {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 12,
        "first_k_dense_replace": 1,
        "q_lora_rank": 10,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    },
)


@pytest.fixture(autouse=True)
def quiet_transformers() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in bf16 with fp32 norms, and what stands beside the weights."""
    folder = tmp_path / "source"
    model = MIXTRAL.build(dtype=torch.bfloat16)
    model.save_pretrained(folder)
    stored = load_file(folder / SINGLE)
    save_file({name: t.float() if "norm" in name else t for name, t in stored.items()}, folder / SINGLE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [3, 4], "bos_token_id": 1}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (folder / "notes.txt").write_text("not ours")
    return folder


def converted(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["convert", *map(str, words)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["convert", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.strip()


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_a_checkpoint_keeps_every_bit_and_every_word(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = converted(capsys, source, tmp_path / "new")
    assert same(stored(source), stored(tmp_path / "new"))
    assert "bfloat16, float32" in text
    assert "every tensor read again and equal to the source's, bit by bit; logits differ by 0 of" in text
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "new"))
    assert after.pop("torch_dtype") == before.pop("dtype") == "bfloat16"
    assert after == before
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"config.json", SINGLE, "tokenizer.json", "generation_config.json"}
    for name in names:
        assert f"new/{name}" in text
    assert not list(tmp_path.glob(".*"))


def test_to_zoo_and_back(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(capsys, source, tmp_path / "own", "to=zoo")
    assert "layers.0.ffn.experts.gate_up" in stored(tmp_path / "own")
    converted(capsys, tmp_path / "own", tmp_path / "back")
    assert same(stored(source), stored(tmp_path / "back"))
    ids = torch.randint(0, SIZES["vocab_size"], (2, 11))
    expected = logits(zoo.from_pretrained(source), ids)
    assert torch.equal(logits(zoo.from_pretrained(tmp_path / "own"), ids), expected)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [3, 4])


def test_another_dtype_casts_parameters_and_no_buffer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = DEEPSEEK.build()
    model.save_pretrained(tmp_path / "source")
    converted(capsys, tmp_path / "source", tmp_path / "new", "dtype=bf16")
    before, after = stored(tmp_path / "source"), stored(tmp_path / "new")
    for name, tensor in before.items():
        kept = name.endswith("e_score_correction_bias")
        assert torch.equal(after[name], tensor if kept else tensor.bfloat16()), name
        assert after[name].dtype == (tensor.dtype if kept else torch.bfloat16)
    assert json.loads((tmp_path / "new/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_values_too_large_for_a_dtype_are_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = stored(source)
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 4] = 1e6
    save_file(tensors, source / SINGLE)
    message = refused(capsys, source, tmp_path / "new", "dtype=fp16")
    assert message.startswith("model.layers.2.self_attn.o_proj.weight: holds values up to 9.994e+05, too large for")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_blocks_of_multi_token_prediction_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DEEPSEEK.build().save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    spec = zoo.spec_from_hf({**config, "num_nextn_predict_layers": 1})
    assert spec.mtp is not None
    model = zoo.build(spec.replace(mtp=spec.mtp.replace(enabled=True)))
    zoo.save_pretrained(model, tmp_path / "source")
    (tmp_path / "source/config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    converted(capsys, tmp_path / "source", tmp_path / "new")
    assert any("eh_proj" in name for name in stored(tmp_path / "new"))
    assert same(stored(tmp_path / "source"), stored(tmp_path / "new"))


def test_what_is_left_out_is_said(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**stored(source), **extra}, source / SINGLE)
    text = converted(capsys, source, tmp_path / "new")
    assert (
        "1 of the source's tensors, no weights or copies of others: model.layers.0.self_attn.rotary_emb.inv_freq"
        in text
    )


def test_one_tensor_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the same layout are read singly, also where the model stacks many of them."""
    read: list[str] = []
    tensors = type(converting.open_checkpoint(source).tensors)
    whole = tensors.read
    monkeypatch.setattr(tensors, "read", lambda self, name: read.append(name) or whole(self, name))
    monkeypatch.setattr(converting, "LOGITS_UP_TO", 0)
    monkeypatch.setattr(converting, "assembled", None)  # would take a parameter, which holds several
    done = converting.convert(source, tmp_path / "new", max_shard_bytes=10_000)
    assert len(read) == 3 * done.num_tensors  # to write, and twice to compare
    assert (tmp_path / "new" / INDEX).exists()
    assert done.logits_difference is None


def run_directory(folder: Path) -> Path:
    run = small_run(folder, "model.moe.balance.aux_loss=0.01")
    model = zoo.build(run.model)
    state = {"settings": run.to_dict()}
    save_checkpoint(folder, 3, model, [], state, keep=1)
    save_checkpoint(folder, 6, model, [], state, keep=2)
    return folder


def test_the_newest_checkpoint_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run_directory(tmp_path)
    text = converted(capsys, run_dir, tmp_path / "hf")
    assert "checkpoints/step_000006, zoo checkpoint" in text
    assert "the model reads bytes, for which there is no tokenizer file" in text
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", experts_implementation="eager")
    ids = tokens(2, 9, 256)
    expected = logits(zoo.from_pretrained(run_dir), ids)
    torch.testing.assert_close(logits(opened, ids), expected, rtol=0, atol=float(1e-4 * expected.std()))
    (run_dir / "checkpoints/step_000006" / SINGLE).write_bytes(b"cut")
    assert "step_000003" in converted(capsys, run_dir, tmp_path / "older")
    assert "is no complete checkpoint; passed over" in refused(capsys, run_dir / "checkpoints/step_000006", tmp_path)


def test_upcycling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = Twin("", "llama", {}).build()
    reference.save_pretrained(tmp_path / "dense")
    words = ["upcycle.num_experts=4", "upcycle.top_k=2"]
    converted(capsys, tmp_path / "dense", tmp_path / "hf", *words, "upcycle.balance.aux_loss=0.01")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", experts_implementation="eager")
    assert opened.config.model_type == "mixtral"
    assert opened.config.router_aux_loss_coef == 0.01
    ids = torch.randint(0, SIZES["vocab_size"], (2, 11))
    expected = logits(reference, ids)
    assert (logits(opened, ids) - expected).abs().max() < 1e-4 * expected.std()
    fine = ["upcycle.num_experts=8", "upcycle.top_k=4", "upcycle.granularity=2"]
    message = refused(capsys, tmp_path / "dense", tmp_path / "fine", *fine)
    assert message.endswith("zoo's own layout holds every model: to=zoo")
    converted(capsys, tmp_path / "dense", tmp_path / "fine", *fine, "to=zoo")
    assert (logits(zoo.from_pretrained(tmp_path / "fine"), ids) - expected).abs().max() < 1e-4 * expected.std()
    assert refused(capsys, tmp_path / "dense", tmp_path / "x", "upcycle.top_k=2") == (
        "upcycle.num_experts: missing; give it a value"
    )


def test_a_directory_is_overwritten_only_when_asked(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "new"
    dest.mkdir()
    converted(capsys, source, dest)
    (dest / "mine.txt").write_text("kept")
    (dest / "model-00001-of-00002.safetensors").write_bytes(b"of another checkpoint")
    assert "is not empty; name another directory, or replace its checkpoint: overwrite=true" in refused(
        capsys, source, dest
    )
    converted(capsys, source, dest, "overwrite=true", "to=zoo")
    assert {path.name for path in dest.iterdir()} == {
        "mine.txt",
        "state.json",
        SINGLE,
        "tokenizer.json",
        "generation_config.json",
    }
    assert "holds the source" in refused(capsys, source, source, "overwrite=true")
    assert "holds the source" in refused(capsys, source, tmp_path, "overwrite=true")
    assert "is a file; name a directory" in refused(capsys, source, dest / "mine.txt")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("to", ["hf", "zoo"])
def test_a_flaw_in_what_was_written_is_found(
    to: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = converting.write_tensors

    def badly(directory: Path, entries: Sequence[Any], max_shard_bytes: int) -> None:
        write(directory, entries, max_shard_bytes)
        flip(directory / SINGLE)

    monkeypatch.setattr(converting, "write_tensors", badly)
    message = refused(capsys, source, tmp_path / "new", f"to={to}")
    last = "lm_head.weight" if to == "hf" else "head.weight"
    assert message.startswith(f"{last}: what was written is not what the source holds")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_wrong_description_is_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = converting._description
    wrong = {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}
    monkeypatch.setattr(converting, "_description", lambda *args, **kwargs: describe(*args, **kwargs) | wrong)
    message = refused(capsys, source, tmp_path / "new")
    assert message.startswith("what was written describes another model than the source:")
    assert "attention.rope.theta" in message


def test_what_cannot_be_read_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = tmp_path / "new"
    assert refused(capsys, tmp_path / "nowhere", dest).startswith("SOURCE: found ")
    assert refused(capsys, source, dest, "dtype=fp8").startswith("dtype: found 'fp8'; input should be 'fp32', 'bf16'")
    assert "did you mean overwrite?" in refused(capsys, source, dest, "overwrit=true")
    assert "dtype: is given twice" in refused(capsys, source, dest, "dtype=bf16", "dtype=fp32")
    assert "the following arguments are required: DEST" in refused(capsys, source)
    shutil.move(source / SINGLE, source / "pytorch_model.bin")
    for place in (source, source / "pytorch_model.bin"):
        assert "pickled weights can run code and are not read" in refused(capsys, place, dest)
    assert not dest.exists()


def test_a_model_that_no_family_expresses_is_saved_by_zoo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model().eval()  # a window in some layers and experts in others
    state = {"settings": {"model": model.spec.to_dict()}}
    save_checkpoint(tmp_path, 1, model, [], state, keep=1)
    assert "to=zoo" in refused(capsys, tmp_path, tmp_path / "hf")
    converted(capsys, tmp_path, tmp_path / "own", "to=zoo")
    assert torch.equal(logits(zoo.from_pretrained(tmp_path / "own"), tokens(1, 9)), logits(model, tokens(1, 9)))
