"""`zoo eval`: how well a model predicts texts, and what it reaches on the tasks of lm-eval."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from zoo.cli.console import Parser, table, write
from zoo.cli.convert import DTYPES, Dtype
from zoo.cli.keys import read_keys
from zoo.cli.places import Device, checkpoint_place, device_for
from zoo.data.documents import Flaw, Source, find_sources, read_documents
from zoo.data.progress import Progress
from zoo.spec.base import ConfigError, Items, Spec, decode
from zoo.spec.data import FilesData

WHAT = """\
Score texts with a model: nats a token, perplexity of a token, and bits per byte, which compare across tokenizers. Each
document is scored on its own. PATH is a checkpoint that zoo opens, the directory of a run, or the name of a model that
was trained here.

settings:
  text=FILE              text, JSONL, Parquet or Arrow, a directory or a pattern; may be given several times
  text_key=text          key of a JSON line or column of a table
  seq_len=1024           most tokens that the model reads at once
  stride=N               targets of each further window, at most seq_len; the fewer, the more each token has before it
  batch_size=8           windows, or requests of tasks, at once
  max_documents=N        of each file
  tasks=NAME             of lm-eval (pip install 'moe-zoo[eval]'); may be given several times
  task_dir=DIR           with further tasks
  limit=N                examples of each task
  out=FILE               write what was found
  dtype=fp32|bf16|fp16|fp64    of the weights; otherwise as they are stored
  device=auto|cpu|cuda|mps
  tokenizer=FILE|bytes   another tokenizer than the checkpoint's"""
EXAMPLES = """\
  zoo eval outputs/2026-01-01/12-00-00-tiny_moe text=README.md
  zoo eval tiny_moe text=docs/ text=more.jsonl stride=128
  zoo eval ./checkpoint tasks=hellaswag tasks=arc_easy limit=100"""


class EvalSettings(Spec):
    """As `zoo eval --help` says."""

    text: Items[str] = ()
    text_key: str = "text"
    seq_len: PositiveInt = 1024
    stride: PositiveInt | None = None
    batch_size: PositiveInt = 8
    max_documents: PositiveInt | None = None
    tasks: Items[str] = ()
    task_dir: str | None = None
    limit: PositiveInt | None = None
    out: str | None = None
    dtype: Dtype | None = None
    device: Device = "auto"
    tokenizer: str | None = None


def run(arguments: Sequence[str]) -> None:
    """Score, print and write."""
    parser = Parser("eval", "PATH text=FILE [settings]", WHAT, EXAMPLES)
    parser.add_argument("path", metavar="PATH", help="the checkpoint, or a model's name")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="see above")
    given = parser.read(arguments)
    settings = read_keys(EvalSettings, given.settings, ("text", "tasks"))
    _check(settings)
    place, sources = checkpoint_place(given.path), _sources(settings)
    # Torch is imported here, when nothing is left that is wrong in what was typed.
    torch = importlib.import_module("torch")
    source = importlib.import_module("zoo.hf.source").open_checkpoint(place)
    text = importlib.import_module("zoo.hf.tokenizer").text_of(source, settings.tokenizer)
    dtype = None if settings.dtype is None else getattr(torch, DTYPES[settings.dtype])
    load = importlib.import_module("zoo.hf.checkpoint").from_pretrained
    model = load(source, dtype, device_for(torch, settings.device))
    positions = source.spec.embedding.positions
    if positions is not None and settings.seq_len > positions:
        raise ConfigError(f"seq_len: found {settings.seq_len}; the model has {positions} positions")
    found: dict[str, Any] = {"model": str(place)}
    if sources:
        found["texts"] = _predict(model, text, sources, settings)
    if settings.tasks:
        found["tasks"] = _run_tasks(model, text, settings)
    if settings.out:
        Path(settings.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write("", f"written: {settings.out}")


def _check(settings: EvalSettings) -> None:
    if not settings.text and not settings.tasks:
        raise ConfigError("text: missing; name a file to score, text=README.md, or a task of lm-eval, tasks=arc_easy")
    if settings.stride is not None and settings.stride > settings.seq_len:
        raise ConfigError(f"stride: found {settings.stride}; must be at most seq_len, {settings.seq_len}")
    if settings.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks: needs the package lm_eval; pip install 'moe-zoo[eval]'")


def _files(settings: EvalSettings) -> FilesData:
    return decode(FilesData, {"paths": list(settings.text), "text_key": settings.text_key}, "text")


def _sources(settings: EvalSettings) -> list[Source]:
    if not settings.text:
        return []
    try:
        return find_sources(_files(settings))
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.paths", "text", 1)) from None


def _predict(model: Any, text: Any, sources: Sequence[Source], settings: EvalSettings) -> dict[str, dict[str, float]]:
    """Score each file, and print a line for each and for all together."""
    predict = importlib.import_module("zoo.eval.perplexity").predict
    found, done = {}, 0
    with Progress("scoring", sum(source.path.stat().st_size for source in sources)) as progress:
        for source in sources:
            documents = list(_documents(source, settings))
            if documents:
                found[source.name] = predict(
                    model,
                    text,
                    documents,
                    seq_len=settings.seq_len,
                    stride=settings.stride,
                    batch_size=settings.batch_size,
                )
            done += source.path.stat().st_size
            progress.update(done)
    rows = {name: one for name, one in found.items() if one.tokens}
    if not rows:
        raise ConfigError("text: found no token to predict; give longer texts")
    total = sum(list(rows.values())[1:], next(iter(rows.values())))
    shown = {**rows, "all": total} if len(rows) > 1 else rows
    head = ("text", "documents", "tokens", "bytes", "nats/token", "perplexity", "bits/byte")
    cells = [
        (name, *(f"{count:,}" for count in (p.documents, p.tokens, p.bytes)), *_rates(p)) for name, p in shown.items()
    ]
    write(table(head, cells, right=head[1:], fold=("text",)))
    facts = ("documents", "tokens", "bytes", "loss", "perplexity", "bits_per_byte")
    return {name: {fact: getattr(one, fact) for fact in facts} for name, one in shown.items()}


def _rates(prediction: Any) -> tuple[str, ...]:
    return f"{prediction.loss:.4f}", f"{prediction.perplexity:.4g}", f"{prediction.bits_per_byte:.4f}"


def _documents(source: Source, settings: EvalSettings) -> Iterator[str]:
    for number, found in enumerate(read_documents(_files(settings), [source])):
        if isinstance(found, Flaw):
            raise ConfigError(f"text: {found.where}: {found.reason}; name files or a pattern without it")
        if settings.max_documents is not None and number >= settings.max_documents:
            return
        yield found.text.decode()


def _run_tasks(model: Any, text: Any, settings: EvalSettings) -> dict[str, Any]:
    """Run the tasks of lm-eval, and print what it found."""
    evaluate = importlib.import_module("lm_eval").simple_evaluate
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=settings.task_dir)
    unknown = [name for name in settings.tasks if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"tasks: found {', '.join(unknown)}; lm-eval knows no such task; see 'lm_eval ls tasks'")
    wrapped = importlib.import_module("zoo.eval.lm_eval").ZooLM(model, text, settings.seq_len, settings.batch_size)
    results = evaluate(wrapped, tasks=list(settings.tasks), limit=settings.limit, task_manager=manager)["results"]
    rows = [
        (task, name.partition(",")[0], f"{value:.4f}", _shown_error(measured, name))
        for task, measured in results.items()
        for name, value in measured.items()
        if isinstance(value, float) and "_stderr" not in name
    ]
    write(table(("task", "measure", "value", "standard error"), rows, right=("value", "standard error")))
    return {task: dict(measured) for task, measured in results.items()}


def _shown_error(measured: dict[str, Any], name: str) -> str:
    first, _, rest = name.partition(",")
    error = measured.get(f"{first}_stderr,{rest}")
    return f"{error:.4f}" if isinstance(error, float) else ""
