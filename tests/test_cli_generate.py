"""`zoo generate`: prompts in, text out, whatever the checkpoint is."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

import zoo
from tests.hf.checks import Twin
from tests.hf.gguf_files import write_gguf
from tests.train.runs import small_run
from zoo.cli import main
from zoo.cli.generate import _Row
from zoo.data.tokenizer import load_tokenizer
from zoo.decoder import Decoder
from zoo.hf.tokenizer import _OfLibrary
from zoo.spec.data import BytesTokenizer
from zoo.train.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on nothing: its text is noise, and that is enough."""
    folder = tmp_path_factory.mktemp("outputs") / "outputs/2026-01-31/12-00-00"
    folder.mkdir(parents=True)
    run = small_run(folder, "model.init.std=0.2")
    torch.manual_seed(0)
    save_checkpoint(folder, 6, zoo.build(run.model), [], {"settings": run.to_dict()}, keep=1)
    return folder


def library_tokenizer() -> tokenizers.Tokenizer:
    """Bytes with a merge, special tokens, and a first token that is put before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: index for index, word in enumerate(["<s>", "</s>", "<|stop|>", *alphabet, "th"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|stop|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tokenizer."""
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("hub")
    Twin("", "llama", {"vocab_size": 260, "max_position_embeddings": 128}).build().save_pretrained(folder)
    library_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def written(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["generate", *map(str, words)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["generate", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.strip()


def expected(model: Decoder, ids: list[int], num_new: int) -> list[int]:
    return model.generate(torch.tensor([ids]), num_new)[0, len(ids) :].tolist()


def test_the_newest_checkpoint_of_a_run_writes_bytes(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, prompt = zoo.from_pretrained(run_dir), "def é("
    new = expected(model, list(prompt.encode()), 40)
    new = new[: new.index(0)] if 0 in new else new
    text = bytes(new).decode(errors="replace")
    assert written(capsys, run_dir, f"prompt={prompt}", "max_new_tokens=40") == f"{prompt}{text}\n"
    assert written(capsys, run_dir, f"prompt={prompt}", "max_new_tokens=40", "echo=false") == f"{text}\n"
    assert written(capsys, run_dir, f"prompt={prompt}", "max_new_tokens=0") == f"{prompt}\n"


def test_a_model_means_its_newest_run(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_dir.parents[2])
    words = ("prompt=x", "max_new_tokens=9")
    assert written(capsys, "tiny_moe", *words) == written(capsys, run_dir, *words)
    assert refused(capsys, "tiny_dense", *words) == (
        "PATH: found 'tiny_dense'; no run of this model below outputs/; train one: zoo train model=tiny_dense"
    )


def test_a_directory_of_the_hub_uses_its_tokenizer(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, model = library_tokenizer(), zoo.from_pretrained(hub)
    ids = tokenizer.encode("the end<|stop|>").ids
    assert (ids[0], ids[-1]) == (0, 2)
    text = tokenizer.decode(expected(model, ids, 30))
    assert written(capsys, hub, "prompt=the end<|stop|>", "max_new_tokens=30") == f"the end<|stop|>{text}\n"


def test_a_batch_gives_what_each_prompt_gives_alone(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["the first, the longest", "second", "a"]
    options = ("max_new_tokens=12", "dtype=fp64")
    alone = [written(capsys, hub, f"prompt={prompt}", *options) for prompt in prompts]
    together = "".join(f"--- {index} of 3\n{text}" for index, text in enumerate(alone, 1))
    assert written(capsys, hub, *(f"prompt={prompt}" for prompt in prompts), *options) == together
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    assert written(capsys, hub, f"prompts={tmp_path / 'prompts.txt'}", *options) == together
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(prompts[1:])))
    assert written(capsys, hub, f"prompt={prompts[0]}", "prompts=-", *options) == together


def test_draws_follow_the_seed(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (hub, "prompt=a", "max_new_tokens=20", "temperature=1.5", "top_k=50", "top_p=0.95")
    assert written(capsys, *words, "seed=1") == written(capsys, *words, "seed=1")
    assert written(capsys, *words, "seed=1") != written(capsys, *words, "seed=2")


def test_a_stop_ends_a_text_before_it(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, model = library_tokenizer(), zoo.from_pretrained(hub)
    new = expected(model, tokenizer.encode("a").ids, 30)
    whole = tokenizer.decode(new)
    words = ("prompt=a", "echo=false", "max_new_tokens=30")
    stop = whole[5:8]
    assert written(capsys, hub, *words, f"stop={stop}", "stop=never there") == whole[: whole.index(stop)] + "\n"
    special = tokenizer.id_to_token(new[7])
    tokenizer.add_special_tokens([special])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    before = tokenizer.decode(new[: new.index(new[7])])
    assert written(capsys, hub, *words, f"stop={special}", f"tokenizer={tmp_path}") == before + "\n"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("several", [False, True])
def test_a_checkpoint_says_what_ends_a_text(
    name: str, several: bool, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = library_tokenizer()
    new = expected(zoo.from_pretrained(hub), tokenizer.encode("a").ids, 30)
    for path in hub.iterdir():
        if path.name != "generation_config.json":
            shutil.copy(path, tmp_path)
    known = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
    (tmp_path / name).write_text(json.dumps({**known, "eos_token_id": [new[4], 1] if several else new[4]}))
    found = written(capsys, tmp_path, "prompt=a", "echo=false", "max_new_tokens=30")
    assert found == tokenizer.decode(new[: new.index(new[4])]) + "\n"


class _Text:
    """A byte a token; 0 ends a text."""

    ends: frozenset[int] = frozenset([0])

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def special(self, text: str) -> int | None:
        return None


@pytest.mark.parametrize(
    ("stops", "new", "pieces"),
    [
        ([], b"abc", ["a", "b", "c"]),
        ([], "aé€x".encode(), ["a", "", "é", "", "", "€", "x"]),
        ([], b"ab\0cd", ["a", "b", "", "", ""]),
        ([], b"\xff\xffa", ["", "", "\ufffd\ufffda"]),
        ([], b"a\xe2\x82", ["a", "", "", "\ufffd"]),
        (["END"], b"one END two", ["", "", "o", "n", "e", " ", "", "", "", "", ""]),
        (["END"], b"one EN", ["", "", "o", "n", "e", " ", "EN"]),
        (["longer than all"], b"abc", ["", "", "", "abc"]),
        (["d", "bc"], b"abcd", ["", "a", "", ""]),
    ],
)
def test_text_comes_as_soon_as_it_is_certain(stops: list[str], new: bytes, pieces: list[str]) -> None:
    row = _Row(_Text(), stops, {0})
    found = [row.take(byte) for byte in new]
    if not row.ended and (rest := row.rest()):
        found.append(rest)
    assert found == pieces


def test_a_gguf_file_takes_another_tokenizer(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = Twin("", "llama", {"vocab_size": 260}).build()
    path = write_gguf(tmp_path / "model.gguf", reference, {".tokenizer.ggml.eos_token_id": 1})
    text = written(capsys, path, "prompt=the", "max_new_tokens=8", f"tokenizer={hub}")
    ids = library_tokenizer().encode("the").ids
    assert text == "the" + library_tokenizer().decode(expected(zoo.from_pretrained(path), ids, 8)) + "\n"
    assert "name a tokenizer.json" in refused(capsys, path, "prompt=the")


def test_mistakes_are_named(
    hub: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "prompt=a"
    assert refused(capsys, hub) == 'prompt: missing; give it a value: prompt="Once upon a time"'
    assert "did you mean temperature?" in refused(capsys, hub, prompt, "temper=1")
    assert refused(capsys, hub, prompt, "temperature=-1").startswith("temperature: found -1; input should be greater")
    assert refused(capsys, hub, prompt, "max_new_tokens") == "max_new_tokens: has no value; write max_new_tokens=VALUE"
    assert "found several values" in refused(capsys, hub, prompt, "top_k=1,2")
    assert "did you mean tiny_moe" in refused(capsys, "tiny_mo", prompt)
    assert refused(capsys, hub, f"prompts={tmp_path / 'none'}").startswith("prompts: found ")
    assert refused(capsys, hub, prompt, "tokenizer=none.json").startswith("tokenizer: found 'none.json'; there is no")
    (tmp_path / "broken.json").write_text("{")
    assert "not a tokenizer.json" in refused(capsys, hub, prompt, f"tokenizer={tmp_path / 'broken.json'}")
    narrow = Twin("", "llama", {"vocab_size": 50}).build()
    narrow.save_pretrained(tmp_path / "narrow")
    assert "holds no tokenizer.json" in refused(capsys, tmp_path / "narrow", prompt)
    assert "gives token 97; the model knows 50" in refused(capsys, tmp_path / "narrow", prompt, "tokenizer=bytes")
    if not torch.cuda.is_available():
        assert refused(capsys, hub, prompt, "device=cuda").startswith("device: found 'cuda'; torch")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "needs the package tokenizers; pip install 'moe-zoo[data]'" in refused(capsys, hub, prompt)


def test_learned_positions_are_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.GPT2Config(vocab_size=256, n_positions=12, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    words = (tmp_path, "prompt=abcd", "tokenizer=bytes")
    written(capsys, *words, "max_new_tokens=8")
    assert "prompt and new text are 13 tokens, the model has 12 positions" in refused(
        capsys, *words, "max_new_tokens=9"
    )


def test_an_empty_prompt_begins_with_what_the_tokenizer_puts_first(hub: Path, run_dir: Path) -> None:
    assert _OfLibrary(library_tokenizer(), frozenset()).encode("") == [0]
    bare = library_tokenizer()
    bare.post_processor = processors.ByteLevel()
    with pytest.raises(zoo.ConfigError, match="prompt: found ''"):
        _OfLibrary(bare, frozenset()).encode("")
    assert load_tokenizer(BytesTokenizer()).encode("") == []
    assert main(["generate", str(run_dir), "prompt=", "max_new_tokens=1"]) == 0


def test_mistakes_need_no_torch(tmp_path: Path) -> None:
    code = "import sys; from zoo.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    for verb, words in {"generate": ["nowhere", "prompt=a"], "convert": ["nowhere", "there", "dtype=fp8"]}.items():
        done = subprocess.run(
            [sys.executable, "-c", code, verb, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.stdout.split() == ["2", "False"], done.stderr


def test_decoding_can_be_chosen(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = (run_dir, "prompt=def", "max_new_tokens=6")
    texts = {written(capsys, *given, f"decode={way}") for way in ("auto", "eager")}
    assert len(texts) == 1
    said = refused(capsys, *given, "decode=quick")
    assert "decode: found 'quick'; input should be 'auto', 'eager' or 'compiled'" in said
