"""How the verbs read arguments and write tables."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from zoo.cli.wording import SEQ_LEN
from zoo.registry import take_config_dirs
from zoo.spec.base import ConfigError

PLAIN_WIDTH = 100_000
"""Columns where nothing is a terminal: lines are as long as they need to be."""

GAP = 2
"""Columns between the columns of a table."""


class Parser(argparse.ArgumentParser):
    """The arguments of one verb. A mistake in them is a ConfigError."""

    def __init__(self, verb: str, usage: str, what: str, examples: str) -> None:
        super().__init__(
            prog=f"zoo {verb}",
            usage=f"zoo {verb} {usage}",
            description=what,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        # For --help alone: `read` takes it out before.
        self.add_argument(
            "--config-dir", "-cd", metavar="DIR", help="a folder laid out like conf/, with further models"
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see '{self.prog} --help'")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The arguments; folders given by `--config-dir` are registered on the way."""
        return self.parse_intermixed_args(take_config_dirs(arguments))


def add_seq_len(parser: Parser) -> None:
    """The option that FLOPs are counted at."""
    what = f"tokens of a sequence, which FLOPs depend on; otherwise {SEQ_LEN:,}, or the model's context if shorter"
    parser.add_argument("--seq-len", type=int, metavar="N", help=what)


def write(*parts: RenderableType) -> None:
    """Print in the width of the terminal; anywhere else plainly, one line a row."""
    if sys.stdout.isatty():
        console = Console(highlight=False)
        for part in parts:
            # Rather lines that are too long for a narrow terminal than numbers that are cut off.
            least = _least_width(console, part) if isinstance(part, Table) else 0
            Console(highlight=False, width=max(console.width, least)).print(part)
        return
    buffer = io.StringIO()
    Console(file=buffer, width=PLAIN_WIDTH, color_system=None, highlight=False).print(*parts, sep="\n")
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines()))


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], right: Iterable[str] = (), fold: Iterable[str] = ()
) -> Table:
    """A table without lines.

    Args:
        head: The names of the columns.
        rows: Their cells.
        right: Columns that are numbers.
        fold: Columns that give way on a narrow terminal; the others stay whole.
    """
    right, fold = {*right}, {*fold}
    made = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for name in head:
        header = name.replace(" ", "\n", 1) if name in right and sys.stdout.isatty() else name
        side: Literal["left", "right"] = "right" if name in right else "left"
        made.add_column(header, justify=side, no_wrap=name not in fold, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def _least_width(console: Console, made: Table) -> int:
    """Columns of the narrowest form of a table in which no word is cut."""
    wide = console.options.update(max_width=PLAIN_WIDTH)
    return Measurement.get(console, wide, made).minimum + GAP * len(made.columns)


def title(text: str) -> Text:
    """The heading of a table."""
    return Text(f"\n{text}", style="bold")
