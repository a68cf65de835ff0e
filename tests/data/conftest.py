"""Texts and tokenizers on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.spec.data import FileTokenizer


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    """A byte-level BPE tokenizer of 400 tokens that would truncate and pad if it were let."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return FileTokenizer(path=str(path), separator="<|endoftext|>")
