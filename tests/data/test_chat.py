"""Conversations: rendered and tokenized as transformers does, and learned where it marks what the assistant says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data.chat import CHATML, Template, load_template
from zoo.data.corpus import load_corpus
from zoo.data.tokenizer import load_tokenizer
from zoo.spec.base import ConfigError, decode
from zoo.spec.data import BytesTokenizer, ChatData, FileTokenizer

MARKED = (
    "{%- for message in messages %}"
    "{%- if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else %}{{ message['content'] | trim + '<|im_end|>\n' }}{% endif %}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def say(*contents: str) -> list[dict[str, str]]:
    """Turns of the user and the assistant."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with the special tokens of chats."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    path = tmp_path_factory.mktemp("chat") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def spec(tokenizer_json: Path) -> FileTokenizer:
    return FileTokenizer(path=str(tokenizer_json), separator="<|endoftext|>")


@pytest.fixture(scope="module")
def reference(tokenizer_json: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json), chat_template=MARKED)


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    lambda text: text.strip()
)


@settings(deadline=None, max_examples=20)
@given(contents=st.lists(TEXT, min_size=2, max_size=6))
def test_tokens_and_what_is_learned_are_those_of_transformers(
    contents: list[str], spec: FileTokenizer, reference: Any
) -> None:
    messages = say(*contents)
    wanted = reference.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    found = load_tokenizer(spec).encode_documents([Template(MARKED).parts(messages)])
    assert found.tokens.tolist() == [*wanted["input_ids"], 0]
    assert found.learned is not None
    assert found.learned.tolist() == [*wanted["assistant_masks"], 0]


def test_parts_of_the_built_in_template() -> None:
    messages = [{"role": "system", "content": "S"}, *say("U", "A", "V", "B")]
    parts = load_template("chatml").parts(messages)
    assert [(text.decode(), learned) for text, learned in parts] == [
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n", False),
        ("A<|im_end|>", True),
        ("\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n", False),
        ("B<|im_end|>", True),
        ("\n", False),
    ]


def test_answers_that_a_template_shortens_later_are_read_only() -> None:
    thoughts = CHATML.replace("message.content", "(message.content if loop.last else message.content.split('!')[-1])")
    parts = Template(thoughts).parts(say("U", "think! A", "V", "think! B"))
    assert [text.decode() for text, learned in parts if learned] == ["think! B<|im_end|>"]


def chat_data(folder: Path, *lines: Any, **options: Any) -> ChatData:
    path = folder / "chat.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return decode(ChatData, {"type": "chat", "paths": [str(path)], **options})


def conversations(number: int) -> list[dict[str, Any]]:
    return [{"messages": say(f"What is {n}?", f"{n} is {n + 1} less 1.")} for n in range(number)]


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_a_corpus_of_conversations(tmp_path: Path, kind: str, spec: FileTokenizer) -> None:
    """Kept on disk and made anew, it counts the answers alone."""
    data = chat_data(tmp_path, *conversations(200), heldout_fraction=0.2)
    tokenizer = BytesTokenizer() if kind == "bytes" else spec
    corpus = load_corpus(data, tokenizer, tmp_path / "cache")
    kept = load_corpus(data, tokenizer, tmp_path / "cache")
    assert kept.sha256 == corpus.sha256
    assert corpus.num_train_documents + corpus.num_heldout_documents == 200
    answers = [f"{n} is {n + 1} less 1.<|im_end|>" for n in range(200)]
    assert corpus.num_train_bytes + corpus.num_heldout_bytes == sum(map(len, answers))
    rows, learned = kept.train.rows(np.array([0]), len(kept.train))
    assert learned is not None
    loaded = load_tokenizer(tokenizer)
    read = loaded.decode(rows[0].tolist()).split("\0" if kind == "bytes" else "<|endoftext|>")
    said = loaded.decode(rows[0][learned[0] == 1].tolist()).split("<|im_end|>")
    assert {f"{text}<|im_end|>" for text in said if text} < set(answers)
    assert len(said) == len(read) == corpus.num_train_documents + 1
    other = chat_data(tmp_path, *conversations(200), heldout_fraction=0.2, template=str(write_template(tmp_path)))
    assert load_corpus(other, tokenizer, tmp_path / "cache").sha256 != corpus.sha256


def write_template(folder: Path) -> Path:
    (folder / "own.jinja").write_text(CHATML.replace("<|im_start|>", "# "))
    return folder / "own.jinja"


FLAWS = {
    "no key 'messages'; keys: text": {"text": "a"},
    "'messages' must be a list of messages, not a string": {"messages": "a"},
    "message 2 must be an object with role and content, not a string": {"messages": [*say("a"), "b"]},
    "message 2: 'content' must be a string, not null": {
        "messages": [*say("a"), {"role": "assistant", "content": None}]
    },
    "no message of the role assistant": {"messages": say("a")},
    "not JSON": '{"messages": [',
    "the template refuses it: 'dict object' has no attribute": {
        "messages": [*say("a", "b"), {"role": "x", "content": "c"}]
    },
}


@pytest.mark.parametrize("reason", FLAWS)
def test_lines_that_are_no_conversation_are_named(tmp_path: Path, reason: str) -> None:
    (tmp_path / "strict.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'x' %}{{ m.y.z }}{% endif %}{% endfor %}" + CHATML
    )
    template = str(tmp_path / "strict.jinja") if "refuses" in reason else "chatml"
    data = chat_data(tmp_path, *conversations(30), FLAWS[reason], heldout_fraction=0.2, template=template)
    with pytest.raises(ConfigError) as caught:
        load_corpus(data, BytesTokenizer())
    assert f"chat.jsonl:31: {reason}" in str(caught.value)
    kept = load_corpus(data.replace(on_bad="skip"), BytesTokenizer())
    assert kept.num_train_documents + kept.num_heldout_documents == 30


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "nowhere", "data.template: found .*nowhere'; allowed: chatml, or a file"),
        ({"a.jinja": "{% for %}"}, "a.jinja", "data.template: line 1"),
        ({"tokenizer_config.json": "{}"}, "", "holds no chat template; data.template=chatml is built in"),
        ({"tokenizer_config.json": "["}, "tokenizer_config.json", "not JSON"),
    ],
)
def test_templates_that_are_none(tmp_path: Path, files: dict[str, str], name: str, message: str) -> None:
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_template(str(tmp_path / name))


@pytest.mark.parametrize("form", ["text", "list", "file"])
def test_templates_of_tokenizers(tmp_path: Path, form: str) -> None:
    text = "{{ bos_token }}" + CHATML
    settings: dict[str, Any] = {"bos_token": {"content": "<s>"}}
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(text)
    else:
        settings["chat_template"] = text if form == "text" else [{"name": "default", "template": text}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_template(str(tmp_path)).render(say("a")) == "<s><|im_start|>user\na<|im_end|>\n"


@pytest.mark.parametrize(
    "text", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ range(10**9) | list }}"]
)
def test_templates_cannot_leave_the_sandbox(text: str) -> None:
    with pytest.raises(ValueError, match="the template refuses it"):
        Template(text).render(say("a"))


def test_too_few_conversations_are_not_cut_in_two(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few conversations to hold some of them out"):
        load_corpus(chat_data(tmp_path, *conversations(1)), BytesTokenizer())


def test_conversations_have_no_prompt_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt_key: found 'x'; is not for conversations"):
        chat_data(tmp_path, prompt_key="x")
