"""Training on conversations: the loss counts the answers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.train.runs import Listener, small_run
from zoo.blocks.linear_loss import IGNORED
from zoo.spec.base import ConfigError
from zoo.spec.data import ChatData, FileTokenizer
from zoo.spec.run import RunSpec
from zoo.train import loop
from zoo.train.checks import check_inputs


def chat_run(folder: Path, *overrides: str) -> RunSpec:
    turns = [("user", "in x"), ("assistant", "yes {}"), ("user", "for"), ("assistant", "no {}")]
    rows = [{"messages": [{"role": role, "content": text.format(n)} for role, text in turns]} for n in range(100)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = small_run(folder, "train.seq_len=160", "train.batch_size=2", "train.packing=documents", *overrides)
    return run.replace(data=ChatData(paths=(str(folder / "chat.jsonl"),), heldout_fraction=0.3))


@pytest.mark.usefixtures("known_machine")
def test_the_loss_counts_the_answers_alone(tmp_path: Path) -> None:
    session = loop.Session(chat_run(tmp_path), tmp_path / "run", [heard := Listener()])
    inputs, targets = session.batches.batch(0)
    for row, goals in zip(inputs, targets, strict=True):
        text = bytes(row[1:].tolist())
        learned = bytes(token if goal != IGNORED else 32 for token, goal in zip(text, goals[:-1].tolist(), strict=True))
        whole = [answer for answer in learned.split(b"  ") if answer.strip()]
        assert len(whole) >= 2
        for answer in whole[1:-1]:
            assert answer.strip().startswith((b"yes ", b"no "))
            assert answer.strip().endswith(b"<|im_end|>")
    model = session.parts.model
    with torch.no_grad():
        context = session.context(inputs)
        log_probs = torch.log_softmax(model.eval()(inputs, context), -1)
    counted = targets != IGNORED
    wanted = -log_probs[counted].gather(-1, targets[counted][:, None]).mean()
    model.train()
    session._train_step()
    assert heard.steps[0].loss == pytest.approx(float(wanted), rel=1e-4)


def test_packed_conversations_need_a_separator_of_their_own(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<|im_start|>": 0, "<|im_end|>": 1, "<|endoftext|>": 2, "?": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run = chat_run(tmp_path)
    for separator in ("<|im_end|>", "<|endoftext|>"):
        spec = FileTokenizer(path=str(tmp_path), separator=separator)
        if separator == "<|im_end|>":
            with pytest.raises(ConfigError, match=r"train.packing: found 'documents'; the chat template chatml writes"):
                check_inputs(run.replace(tokenizer=spec))
        else:
            check_inputs(run.replace(tokenizer=spec))
