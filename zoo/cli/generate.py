"""`zoo generate`: continue prompts with a trained model, written as it comes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from zoo.cli.console import Parser
from zoo.cli.convert import DTYPES, Dtype
from zoo.cli.keys import read_keys
from zoo.cli.places import Device, checkpoint_place, device_for
from zoo.spec.base import ConfigError, Items, Spec
from zoo.train.wording import printable

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.decoder import Decoder
    from zoo.hf.tokenizer import Text

EXAMPLES = """\
  zoo generate outputs/2026-01-31/12-00-00 prompt="def main("
  zoo generate tiny_moe prompt="def main(" temperature=0.8      the newest run of that model below outputs/
  zoo generate model.gguf prompt="Gravity is" prompt="The moon is" max_new_tokens=40
  zoo generate checkpoint prompts=questions.txt stop="Question:" top_p=0.9 temperature=0.7"""
WHAT = """\
Continue prompts. PATH is a Hugging Face directory, a GGUF file, a directory of a run, or the name of a model that was
trained here. Special tokens in a prompt are understood, where the tokenizer has them.

settings:
  prompt=TEXT            may be given several times; together they are one batch
  prompts=FILE           one prompt a line; - reads the standard input
  max_new_tokens=128
  temperature=0          0 takes the likeliest token; above, tokens are drawn
  top_k=N top_p=P        draw among the likeliest only
  stop=TEXT              ends a text before this one, or at the special token of that name; may be repeated
  seed=0                 of the draws
  dtype=fp32|bf16|fp16|fp64    of the weights; otherwise as they are stored
  device=auto|cpu|cuda|mps
  decode=auto|eager|compiled   one token at a time: block by block, or on a CPU by kernels that a C++ compiler makes
                         once; auto: compiled where that is possible and worth it
  tokenizer=FILE|bytes   another tokenizer than the checkpoint's
  echo=false             leave the prompt out of what is written"""
TEXTS = ("prompt", "stop")


class GenerateSettings(Spec):
    """What to write on from, and how."""

    prompt: Items[str] = ()
    prompts: str | None = None
    max_new_tokens: NonNegativeInt = 128
    temperature: NonNegativeFloat = 0.0
    top_k: PositiveInt | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: Items[str] = ()
    seed: NonNegativeInt = 0
    dtype: Dtype | None = None
    device: Device = "auto"
    decode: Literal["auto", "eager", "compiled"] = "auto"
    tokenizer: str | None = None
    echo: bool = True


def run(arguments: Sequence[str]) -> None:
    """Write on from the prompts."""
    parser = Parser("generate", "PATH prompt=TEXT [settings]", WHAT, EXAMPLES)
    parser.add_argument("path", metavar="PATH", help="the checkpoint, or a model's name")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="see above")
    given = parser.read(arguments)
    settings = read_keys(GenerateSettings, given.settings, TEXTS)
    prompts, place = _prompts(settings), checkpoint_place(given.path)
    # Torch is imported here, when nothing is left that is wrong in what was typed.
    torch = importlib.import_module("torch")
    source = importlib.import_module("zoo.hf.source").open_checkpoint(place)
    text: Text = importlib.import_module("zoo.hf.tokenizer").text_of(source, settings.tokenizer)
    rows = [text.encode(prompt) for prompt in prompts]
    _check_rows(rows, settings, source.spec)
    dtype = None if settings.dtype is None else getattr(torch, DTYPES[settings.dtype])
    load = importlib.import_module("zoo.hf.checkpoint").from_pretrained
    model: Decoder = load(source, dtype, device_for(torch, settings.device))
    model.decoding = settings.decode
    ends = {*text.ends, *(token for token in map(text.special, settings.stop) if token is not None)}
    writers = [_Row(text, settings.stop, ends) for _ in rows]
    steps = _steps(torch, model, rows, ends, settings)
    if len(rows) == 1:
        _write_live(prompts[0] if settings.echo else "", steps, writers[0])
    else:
        _write_batch(prompts if settings.echo else [""] * len(prompts), steps, writers)


def _prompts(settings: GenerateSettings) -> list[str]:
    prompts = list(settings.prompt)
    if settings.prompts is not None:
        try:
            lines = sys.stdin.read() if settings.prompts == "-" else Path(settings.prompts).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompts: found {settings.prompts!r}; cannot be read: {error}") from None
        prompts += [line for line in lines.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError('prompt: missing; give it a value: prompt="Once upon a time"')
    return prompts


def _check_rows(rows: Sequence[Sequence[int]], settings: GenerateSettings, spec: Any) -> None:
    largest = max(map(max, rows))
    if largest >= spec.vocab_size:
        raise ConfigError(
            f"tokenizer: gives token {largest}; the model knows {spec.vocab_size}; name the tokenizer that it was "
            "trained with: tokenizer=..."
        )
    positions, length = spec.embedding.positions, max(map(len, rows)) + settings.max_new_tokens
    if positions is not None and length > positions:
        rule = f"prompt and new text are {length} tokens, the model has {positions} positions"
        raise ConfigError(f"max_new_tokens: found {settings.max_new_tokens}; {rule}")


def _steps(
    torch: Any, model: Decoder, rows: Sequence[Sequence[int]], ends: set[int], settings: GenerateSettings
) -> Iterable[Tensor]:
    """The new tokens [b] of each step. Shorter prompts are padded at the left."""
    device, longest = model.embed.weight.device, max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows], device=device)
    tokens = torch.tensor([[0] * (longest - len(row)) + [*row] for row in rows], device=device)
    steps: Iterable[Tensor] = importlib.import_module("zoo.generate").stream(
        model,
        tokens,
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop=ends,
        padding=padding if bool(padding.any()) else None,
        generator=torch.Generator(device).manual_seed(settings.seed),
    )
    return steps


class _Row:
    """The text of one row of the batch, as it grows."""

    def __init__(self, text: Text, stops: Sequence[str], ends: set[int]) -> None:
        self._text, self._ends = text, ends
        self._stops = [stop for stop in stops if stop and text.special(stop) is None]
        self._ids: list[int] = []
        self._shown = 0
        self.ended = False

    def take(self, token: int) -> str:
        """The text that is certain now and was not before."""
        if self.ended:
            return ""
        if token in self._ends:
            self.ended = True
            return self.rest()
        self._ids.append(token)
        whole = self._text.decode(self._ids)
        found = [place for stop in self._stops if (place := whole.find(stop)) >= 0]
        if found:
            self.ended = True
            return self._new(whole, min(found))
        # The last characters may be half of one, or the beginning of a stop.
        held = max((len(stop) - 1 for stop in self._stops), default=0)
        return self._new(whole, len(whole.rstrip("\N{REPLACEMENT CHARACTER}")) - held)

    def rest(self) -> str:
        """What was held back."""
        whole = self._text.decode(self._ids)
        return self._new(whole, len(whole))

    def _new(self, whole: str, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return whole[start : self._shown]


def _write_live(prompt: str, steps: Iterable[Tensor], row: _Row) -> None:
    _put(prompt)
    for newest in steps:
        _put(row.take(int(newest[0])))
        if row.ended:
            break
    else:
        _put(row.rest())
    _put("\n")


def _write_batch(prompts: Sequence[str], steps: Iterable[Tensor], rows: Sequence[_Row]) -> None:
    texts = [""] * len(rows)
    for newest in steps:
        for index, token in enumerate(newest.tolist()):
            texts[index] += rows[index].take(token)
        if all(row.ended for row in rows):
            break
    for index, (prompt, text, row) in enumerate(zip(prompts, texts, rows, strict=True), 1):
        rest = "" if row.ended else row.rest()
        _put(f"--- {index} of {len(rows)}\n{prompt}{text}{rest}\n")


def _put(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
