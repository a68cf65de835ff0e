"""`zoo convert`: a checkpoint in another layout, proven equal."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from zoo.cli.console import Parser, table, write
from zoo.cli.keys import read_keys
from zoo.spec.base import ConfigError, Spec, decode
from zoo.train.wording import short_count, shown_path

if TYPE_CHECKING:
    from zoo.hf.convert import Converted

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
Dtype = Literal["fp32", "bf16", "fp16", "fp64"]
EXAMPLES = """\
  zoo convert model.gguf checkpoint                       a GGUF file, dequantized
  zoo convert checkpoint smaller dtype=bf16
  zoo convert outputs/2026-01-31/12-00-00 for_the_hub     the newest checkpoint of a run of zoo train
  zoo convert checkpoint experts upcycle.num_experts=8 upcycle.top_k=2"""
WHAT = """\
Write a checkpoint as a Hugging Face directory, or in zoo's own layout, and prove it equal.
SOURCE is a Hugging Face directory, a GGUF file, or a directory of a run.

settings:
  to=hf|zoo          the layout; zoo holds models that no Hugging Face family expresses
  dtype=fp32|bf16|fp16|fp64    of the weights; otherwise as they are stored
  overwrite=true     replace the checkpoint in DEST; its other files stay
  upcycle.*          make a mixture of experts of a dense model: num_experts, top_k, granularity, seed,
                     and fields of the experts' block such as upcycle.balance.aux_loss=0.01"""


class UpcycleSettings(Spec):
    """What the dense model becomes."""

    num_experts: PositiveInt
    top_k: PositiveInt
    granularity: PositiveInt = 1
    seed: NonNegativeInt = 0


class ConvertSettings(Spec):
    """How to convert."""

    to: Literal["hf", "zoo"] = "hf"
    dtype: Dtype | None = None
    overwrite: bool = False
    upcycle: dict[str, Any] | None = None


def run(arguments: Sequence[str]) -> None:
    """Convert, and print what was written."""
    parser = Parser("convert", "SOURCE DEST [settings]", WHAT, EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint")
    parser.add_argument("dest", metavar="DEST", help="the directory to write")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="see above")
    given = parser.read(arguments)
    settings = read_keys(ConvertSettings, given.settings)
    if not Path(given.source).expanduser().exists():
        raise ConfigError(f"SOURCE: found {given.source!r}; there is no such file or directory")
    change = _upcycling(settings.upcycle) if settings.upcycle is not None else None
    # Torch is imported here, when nothing is left that is wrong in what was typed.
    torch, convert = importlib.import_module("torch"), importlib.import_module("zoo.hf.convert").convert
    dtype = None if settings.dtype is None else getattr(torch, DTYPES[settings.dtype])
    done = convert(given.source, given.dest, to=settings.to, dtype=dtype, overwrite=settings.overwrite, change=change)
    summary = table(("", "what"), _summary(done), fold=("what",))
    summary.show_header = False
    write(summary)


def _upcycling(words: dict[str, Any]) -> Any:
    """The change of the model. Words beside those of `UpcycleSettings` are fields of `MoESpec`."""
    own = {name: value for name, value in words.items() if name in UpcycleSettings.model_fields}
    options = {name: value for name, value in words.items() if name not in own}
    settings = decode(UpcycleSettings, own, "upcycle")

    def change(spec: Any, stored: Any) -> Any:
        upcycling = importlib.import_module("zoo.upcycling")
        new = upcycling.upcycled_spec(spec, settings.num_experts, settings.top_k, settings.granularity, options)
        made = upcycling.UpcycledParameters(stored, stored.dtypes, new, settings.granularity, settings.seed)
        return new, made

    return change


def _summary(done: Converted) -> list[tuple[str, str]]:
    params, dtypes = done.spec.params(), done.dtypes
    size = f"{params.total:,} parameters"
    if params.active != params.total:
        size += f", {short_count(params.active)} active per token"
    rows = [
        ("source", f"{shown_path(done.source.path)}, {done.source.layout}"),
        ("model", size),
        ("written", f"{done.num_tensors:,} tensors, {done.num_bytes / 1e6:,.1f} MB, {', '.join(dtypes)}"),
        ("proven", _proof(done)),
    ]
    if done.left_out:
        names = ", ".join(done.left_out[:3]) + (", ..." if len(done.left_out) > 3 else "")
        rows.append(
            ("left out", f"{len(done.left_out)} of the source's tensors, no weights or copies of others: {names}")
        )
    rows += [("note", note) for note in done.notes]
    rows += [("files" if index == 0 else "", shown_path(done.dest / name)) for index, name in enumerate(done.files)]
    return rows


def _proof(done: Converted) -> str:
    tensors = "every tensor read again and equal to the source's, bit by bit"
    if done.logits_difference is None:
        return f"{tensors}; too large a model to compare logits too"
    return f"{tensors}; logits differ by {done.logits_difference:.1g} of their deviation"
