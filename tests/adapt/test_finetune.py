"""Runs that start from checkpoints: of the hub's layout and of zoo's own, whole, frozen in part, or by adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import zoo
from tests.train.runs import RUN, Listener, small_run
from zoo.adapt.lora import adapt, adapters_of
from zoo.adapt.save import save_adapters
from zoo.cli import main
from zoo.config import compose
from zoo.decoder import Decoder
from zoo.hf import from_pretrained, save_pretrained
from zoo.spec.base import ConfigError
from zoo.spec.finetune import LoraFinetune
from zoo.spec.run import RunSpec, decode_run
from zoo.train import loop

BASE = ["tokenizer=bytes", *RUN]
SPARSE = ("qwen3_30b_a3b", "model_scale=tiny", "model.vocab_size=256")
DENSE = ("qwen3_0_6b", "model_scale=tiny", "model.vocab_size=256")


pytestmark = pytest.mark.usefixtures("known_machine")


def checkpoint(folder: Path, *model: str) -> Path:
    """A Hugging Face directory of random weights."""
    torch.manual_seed(0)
    built = zoo.build(*model)
    with torch.no_grad():
        for value in built.parameters():
            value += 0.05 * torch.randn_like(value)
    save_pretrained(built, folder / "base")
    return folder / "base"


def finetune_run(folder: Path, kind: str, path: Path, *overrides: str) -> RunSpec:
    """A run of a few steps from `path`, on the text of `small_run`."""
    data = small_run(folder).data
    return decode_run(compose([*BASE, f"finetune={kind}", f"finetune.path='{path}'", *overrides])).replace(data=data)


def train(run: RunSpec, run_dir: Path) -> tuple[Listener, loop.Session]:
    heard = Listener()
    session = loop.Session(run, run_dir, [heard])
    with loop.StopSignal() as stop:
        session.run_until(stop)
    return heard, session


def some_tokens() -> Tensor:
    return torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: Decoder) -> Tensor:
    return model.eval()(some_tokens())


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("model", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_a_run_goes_on_from_a_checkpoint_and_learns(tmp_path: Path, model: tuple[str, ...], kind: str) -> None:
    base = checkpoint(tmp_path, *model)
    run = finetune_run(tmp_path, kind, base)
    assert run.model.replace(name="x") == zoo.spec_from_hf(json.loads((base / "config.json").read_text())).replace(
        name="x"
    )
    assert run.finetune.path == str(base)
    session = loop.Session(run, tmp_path / "run", [])
    assert torch.equal(logits_of(session.parts.model), logits_of(from_pretrained(base)))
    heard, _ = train(run, tmp_path / "run")
    assert heard.steps[-1].loss < heard.steps[0].loss - 0.05


@pytest.mark.parametrize("model", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_a_run_of_adapters_is_a_checkpoint_like_any_other(tmp_path: Path, model: tuple[str, ...]) -> None:
    """It holds adapters alone; opened, it is the merged model; converted, transformers computes the same."""
    base = checkpoint(tmp_path, *model)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    _, session = train(finetune_run(tmp_path, "lora", base), tmp_path / "run")
    adapted = logits_of(session.parts.model)
    held = load_file(tmp_path / "run/checkpoints/step_000006/model.safetensors")
    assert held
    assert all("lora_" in name for name in held)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert (adapted - logits_of(from_pretrained(base))).norm() > 1e-2 * adapted.norm()
    merged = from_pretrained(tmp_path / "run")
    torch.testing.assert_close(logits_of(merged), adapted, rtol=1e-4, atol=1e-4)

    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "run"), str(out)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        found = theirs(some_tokens()).logits
    assert (found - adapted).norm() < 1e-4 * adapted.norm()


def test_adapters_stand_on_adapters(tmp_path: Path) -> None:
    """A run of adapters is itself something to start from."""
    base = checkpoint(tmp_path, *DENSE)
    train(finetune_run(tmp_path, "lora", base), tmp_path / "first")
    _, session = train(finetune_run(tmp_path, "lora", tmp_path / "first", "finetune.rank=2"), tmp_path / "second")
    adapted = logits_of(session.parts.model)
    torch.testing.assert_close(logits_of(from_pretrained(tmp_path / "second")), adapted, rtol=1e-4, atol=1e-4)
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match="base: no such directory"):
        from_pretrained(tmp_path / "second")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path: Path, kind: str) -> None:
    base = checkpoint(tmp_path, *SPARSE)
    whole, _ = train(finetune_run(tmp_path, kind, base), tmp_path / "whole")
    first = loop.Session(finetune_run(tmp_path, kind, base), tmp_path / "run", [])
    for _ in range(3):
        first._train_step()
    first._save()
    rest, _ = train(finetune_run(tmp_path, kind, base, "checkpoint.resume=auto"), tmp_path / "run")
    assert rest.start.first_step == 3
    assert rest.losses == whole.losses[3:]
    assert rest.evaluations[-1].loss == whole.evaluations[-1].loss
    other = finetune_run(tmp_path, kind, base, "checkpoint.resume=auto", "finetune.path=" + str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="finetune"):
        loop.Session(other, tmp_path / "run", [])


def test_frozen_weights_stay(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, *SPARSE)
    frozen = "finetune.freeze=['*.router.*','*.experts.*','embed.*']"
    _, session = train(finetune_run(tmp_path, "full", base, frozen), tmp_path / "run")
    before = dict(from_pretrained(base).named_parameters())
    for name, value in session.parts.model.named_parameters():
        rests = ".router." in name or ".experts." in name or name.startswith("embed.")
        assert torch.equal(value, before[name]) is rests, name


def test_a_run_of_zoo_is_a_checkpoint_to_start_from(tmp_path: Path) -> None:
    loop.train(small_run(tmp_path), tmp_path / "first")
    run = finetune_run(tmp_path, "full", tmp_path / "first", "tokenizer=checkpoint", "model.moe.balance.aux_loss=0.5")
    assert run.tokenizer.type == "bytes"
    assert run.model.slots["moe"].balance.aux_loss == 0.5
    session = loop.Session(run, tmp_path / "second", [])
    assert torch.equal(logits_of(session.parts.model), logits_of(from_pretrained(tmp_path / "first")))


def test_sparse_upcycling_starts_where_the_dense_model_is(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, *DENSE)
    words = [*BASE, "experiment=upcycle", f"finetune.path={base}", "finetune.upcycle.num_experts=4"]
    run = decode_run(compose(words)).replace(data=small_run(tmp_path).data)
    assert run.model.slots["moe"].num_experts == 4
    assert run.schedule.type == "wsd"
    session = loop.Session(run, tmp_path / "run", [])
    torch.testing.assert_close(logits_of(session.parts.model), logits_of(from_pretrained(base)), rtol=1e-4, atol=1e-4)
    heard, _ = train(run, tmp_path / "run")
    assert heard.steps[-1].loss < heard.steps[0].loss


MISTAKES = {
    (
        "full",
        "finetune.freeze=[*.rooter.*]",
    ): r"finetune.freeze: found '\*.rooter.\*'; matches parameters of this model in no",
    ("full", "finetune.freeze=['*']"): r"finetune.freeze: .*leaves nothing to train",
    (
        "lora",
        "finetune.targets=[*.router.*]",
    ): r"finetune.targets: found '\*.router.\*'; matches matrices inside layers",
    ("lora", "finetune.rank=0"): r"finetune.rank: found 0; .*greater than 0",
    ("full", "model=tiny_dense"): r"model: found tiny_dense; the checkpoint .* holds another model",
    ("full", "model_scale=tiny"): r"model_scale: found 'tiny'; a model that comes from a checkpoint stays",
    ("full", "model.d_model=128"): r"weights and config.json do not fit",
    ("full", "model.moe.top_kk=2"): r"model.moe.top_kk: .*did you mean top_k",
    ("full", "tokenizer=checkpoint"): r"tokenizer: found no tokenizer.json beside",
    ("full", "finetune.upcycle={num_experts: 4, top_k: 2}"): r"has no MLP in a slot of its own",
    ("lora", "parallel=manual", "parallel.dp=2"): r"parallel|finetune",
}


@pytest.mark.parametrize("words", MISTAKES, ids=lambda words: words[1])
def test_mistakes_are_named(tmp_path: Path, words: tuple[str, ...]) -> None:
    base = checkpoint(tmp_path, *SPARSE)
    with pytest.raises(ConfigError, match=MISTAKES[words]):
        finetune_run(tmp_path, words[0], base, *words[1:])


def test_a_chosen_model_may_be_the_one_that_is_there(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, "tiny_dense")
    run = finetune_run(tmp_path, "full", base, "model=tiny_dense")
    assert run.model.name == "tiny_dense"


def test_adapters_without_a_place_are_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path, *DENSE)
    train(finetune_run(tmp_path, "lora", base), tmp_path / "run")
    place = shutil.copytree(tmp_path / "run/checkpoints/step_000006", tmp_path / "place")
    said = json.loads((place / "state.json").read_text())
    for path, message in {
        base / "nowhere": "no such directory",
        place: "adapters stand on adapters 8 deep, or on themselves",
    }.items():
        said["settings"]["finetune"]["path"] = str(path)
        (place / "state.json").write_text(json.dumps(said))
        with pytest.raises(ConfigError, match=message):
            from_pretrained(place)


def test_adapters_are_saved_without_the_model(tmp_path: Path) -> None:
    base, lora = checkpoint(tmp_path, *SPARSE), LoraFinetune(path=str(tmp_path / "base"), rank=2)
    model = from_pretrained(base)
    with pytest.raises(ConfigError, match="the model has none"):
        save_adapters(model, lora, tmp_path / "adapters")
    adapt(model, lora)
    with torch.no_grad():
        for value in adapters_of(model).values():
            value.normal_(std=0.05)
    save_adapters(model, lora, tmp_path / "adapters")
    held = load_file(tmp_path / "adapters/model.safetensors")
    assert held.keys() == adapters_of(model).keys()
    torch.testing.assert_close(
        logits_of(from_pretrained(tmp_path / "adapters")), logits_of(model), rtol=1e-4, atol=1e-4
    )
