"""Writing text: a prefill over the prompt, then one cached step a token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.blocks.base import Context
from zoo.spec.base import ConfigError

if TYPE_CHECKING:
    from zoo.decoder import Decoder


def generate(
    model: Decoder,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    padding: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue every row of `tokens`.

    Args:
        tokens: [b, s] int64, s at least 1. Shorter prompts are padded at the left, with any token.
        max_new_tokens: how many tokens to add at most.
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
        top_k: draw only from this many likeliest tokens.
        top_p: draw only from the likeliest tokens whose probabilities first sum to at least this (arXiv:1904.09751).
        stop: token ids that end a row; what follows in a row that has ended repeats its stop token.
        padding: [b] int64, how many tokens at the left of each row are padding; None: none.
        generator: of the draws; None: torch's global one.

    Returns:
        [b, s + n] int64: the prompts and n new tokens, n = max_new_tokens or fewer when every row has stopped.
    """
    steps = stream(
        model,
        tokens,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        padding=padding,
        generator=generator,
    )
    return torch.cat((tokens, *(newest[:, None] for newest in steps)), 1)


def stream(
    model: Decoder,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    padding: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The new tokens of `generate`, [b] int64 a step, as soon as each is known. The model is left as it was found.

    Raises:
        ConfigError: `model.decoding` is `compiled`, and that is not possible.
    """
    _check(tokens, max_new_tokens, temperature, top_k, top_p)
    was_training = model.training
    model.eval()
    try:
        yield from _extend(model, tokens, max_new_tokens, _Sampler(temperature, top_k, top_p, generator), stop, padding)
    finally:
        model.train(was_training)


def _extend(
    model: Decoder, tokens: Tensor, num_new: int, sample: _Sampler, stop: Collection[int], padding: Tensor | None
) -> Iterator[Tensor]:
    batch_size, prompt_len = tokens.shape
    states = model.new_states(batch_size, prompt_len + num_new)
    stops = torch.tensor(sorted(stop), dtype=tokens.dtype, device=tokens.device)
    ended = torch.zeros(batch_size, dtype=torch.bool, device=tokens.device)
    newest, step = tokens[:, -1], None
    for past in range(prompt_len, prompt_len + num_new):
        with torch.no_grad():  # not around the yield, which would leave it to the caller
            if past == prompt_len:
                with _fast_products(model):
                    logits = model.logits(model.hidden(tokens, _context(0, tokens, padding), states)[:, -1])
            else:
                step = step or _one_token_step(model, states, prompt_len, num_new - 1, batch_size, padding)
                logits = step(newest, _context(past - 1, newest[:, None], padding))
            newest = torch.where(ended, newest, sample(logits))
        yield newest
        if len(stops):
            ended |= torch.isin(newest, stops)
            if ended.all():
                break


def _fast_products(model: Decoder) -> AbstractContextManager[Any]:
    """Around a prompt's pass: weights in bf16 are no burden for a processor that has no units for it."""
    if model.embed.weight.dtype != torch.bfloat16 or model.decoding == "eager":
        return nullcontext()
    from zoo.decoding.wide import wide_products

    return wide_products(model.embed.weight)


Step = Callable[[Tensor, Context], Tensor]
"""From the newest tokens [b] to logits [b, vocab]."""


def _one_token_step(
    model: Decoder, states: list[Any], start: int, num_new: int, rows: int, padding: Tensor | None
) -> Step:
    """The quickest way to pass one token of each row, as `model.decoding` says."""
    if model.decoding == "compiled" or (model.decoding == "auto" and _pays(model, num_new)):
        from zoo.decoding import compiled_step

        step = compiled_step(model, states, start, num_new, rows, padding)
        if not isinstance(step, str):
            return step
        if model.decoding == "compiled":
            raise ConfigError(f"decode: found 'compiled'; not possible here: {step}; use auto or eager")
    return lambda newest, context: model.logits(model.hidden(newest[:, None], context, states)[:, -1])


def _pays(model: Decoder, num_new: int) -> bool:
    """Whether there is so much to read that compiling, some seconds the first time, is worth it."""
    size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    return model.embed.weight.device.type == "cpu" and size * num_new >= _WORTH_COMPILING


_WORTH_COMPILING = 2**30
"""Bytes of weights times tokens."""


def _context(past: int, tokens: Tensor, padding: Tensor | None) -> Context:
    positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
    if padding is not None:
        positions = (positions - padding[:, None]).clamp_min(0)
    return Context(positions, past, padding)


class _Sampler:
    """From logits [b, vocab] to tokens [b] int64."""

    def __init__(
        self, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
    ) -> None:
        self.temperature, self.top_k, self.top_p, self.generator = temperature, top_k, top_p, generator

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.to(torch.float32) / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            logits = self._nucleus(logits, self.top_p)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0]

    @staticmethod
    def _nucleus(logits: Tensor, top_p: float) -> Tensor:
        ranked, order = logits.sort(descending=True)
        shares = ranked.softmax(-1)
        # What stands before a token decides: the token that crosses the line stays.
        ranked = ranked.masked_fill(shares.cumsum(-1) - shares >= top_p, -torch.inf)
        return torch.empty_like(logits).scatter_(-1, order, ranked)


def _check(tokens: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must be [batch, seq] with at least one token a row, found {list(tokens.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or above, found {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or above, found {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or above, found {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, found {top_p}")
