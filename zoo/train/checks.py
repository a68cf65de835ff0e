"""Checks of a run against the files it names. No torch here: they come before anything slow."""

from __future__ import annotations

from zoo.data.chat import load_template
from zoo.data.documents import find_sources
from zoo.data.tokenizer import Tokenizer, load_tokenizer
from zoo.spec.base import ConfigError
from zoo.spec.data import ChatData
from zoo.spec.run import RunSpec

_CHAT = [{"role": role, "content": "Well."} for role in ("user", "assistant", "user", "assistant")]


def check_inputs(run: RunSpec) -> Tokenizer:
    """The run's tokenizer, after its text was found and its vocabulary fits the model.

    Raises:
        ConfigError: no text or no tokenizer there, or the model knows fewer tokens.
    """
    find_sources(run.data)
    tokenizer = load_tokenizer(run.tokenizer)
    if run.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: found {run.model.vocab_size}; must be at least {tokenizer.vocab_size}, "
            f"the tokens of tokenizer={run.tokenizer.type}"
        )
    _check_packing(run, tokenizer)
    return tokenizer


def _check_packing(run: RunSpec, tokenizer: Tokenizer) -> None:
    """Packed conversations begin where their separator stands, so nothing within them may look like it."""
    if run.train.packing != "documents" or not isinstance(run.data, ChatData):
        return
    parts = load_template(run.data.template).parts(_CHAT)
    if tokenizer.separator in tokenizer.encode_documents([parts]).tokens[:-1].tolist():
        raise ConfigError(
            f"train.packing: found 'documents'; the chat template {run.data.template} writes the token that ends a "
            "document within conversations; name a token that it does not write: tokenizer.separator=..."
        )
