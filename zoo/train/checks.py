"""Checks of a run against the files it names. No torch here: they come before anything slow."""

from __future__ import annotations

from zoo.data.documents import find_sources
from zoo.data.tokenizer import Tokenizer, load_tokenizer
from zoo.spec.base import ConfigError
from zoo.spec.run import RunSpec


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
    return tokenizer
