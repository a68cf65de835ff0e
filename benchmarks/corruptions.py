"""Files that zoo reads, damaged at random, and what becomes of each: the parts of `benchmarks.fuzz`.

A case runs in a process forked for it, with room for 1 GiB beyond what is mapped already and a limit on its time.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from zoo.spec.base import ConfigError
from zoo.train.errors import TrainingError

ROOM_BYTES = 1 << 30
SECONDS = 60
MARK = "executed"
"""A file of this name appears when something in a damaged file was run."""
HOSTILE = (
    b"!!python/object/apply:os.system ['touch executed']",
    b"_target_: os.system",
    b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
    b"\x80\x04cposix\nsystem\n(S'touch executed'\ntR.",
    b"${oc.env:HOME}",
    b"../../../../etc/passwd",
)
NUMBERS = (b"99999999999999", b"-1", b"0", b"1e308", b"NaN", b"null", b'"text"', b"[]", b"{}", b"1.5", b"true")


@dataclass(frozen=True)
class Target:
    """Something that zoo reads."""

    name: str
    prepare: Callable[[Path], None]
    """Write it into an empty folder."""
    files: tuple[str, ...]
    """Patterns of what is damaged."""
    use: Callable[[Path], object]
    """Read it as a user would."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case: `error` (one clear error), `read` (the damage does not show), or a fault."""

    target: str
    seed: int
    kind: str
    detail: str

    @property
    def fault(self) -> bool:
        return self.kind not in ("error", "read")


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, cut, doubled or put in, or a number replaced."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3, 10))):
        if not data:
            break
        at = rng.randrange(len(data))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
            case 2:
                del data[at:]
            case 3:
                end = at + rng.randrange(1, 200)
                data[at:at] = data[at:end]
            case 4:
                data[at:at] = rng.choice(HOSTILE)
            case _:
                _replace_number(data, rng)
    return bytes(data)


def _replace_number(data: bytearray, rng: random.Random) -> None:
    """Put something else for a number of a text; of a safetensors file, for one of its header."""
    digits = [at for at in range(min(len(data), 20_000)) if 48 <= data[at] < 58 and not 48 <= data[at - 1] < 58]
    if not digits:
        return
    start = end = rng.choice(digits)
    while end < len(data) and 48 <= data[end] < 58:
        end += 1
    new = rng.choice(NUMBERS)
    if data[0] < 9 or b"__metadata__" in data[:200]:  # a binary header must keep its length to be looked at closely
        new = str(rng.choice((0, 1, 10 ** (end - start) - 1))).zfill(end - start).encode()
    data[start:end] = new


def run_case(target: Target, place: Path, seed: int) -> Outcome:
    """Damage one file of a prepared folder in a copy of it, and read that."""
    rng = random.Random(f"{target.name} {seed}")
    folder = place.parent / f"{target.name}-{seed}".replace(" ", "-")
    shutil.copytree(place, folder)
    files = sorted(path for pattern in target.files for path in folder.rglob(pattern) if path.is_file())
    chosen = rng.choice(files)
    chosen.write_bytes(damaged(chosen.read_bytes(), rng))
    kind, detail = _apart(target, folder)
    if (folder / MARK).exists():
        kind = "executed"
    shutil.rmtree(folder)
    return Outcome(target.name, seed, kind, f"{chosen.relative_to(folder)}: {detail}")


def _apart(target: Target, folder: Path) -> tuple[str, str]:
    """What reading comes to in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        answer = _answer(target, folder)
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ("hang", f"longer than {SECONDS} s") if number == signal.SIGALRM else ("killed", f"signal {number}")
    kind, detail = json.loads(text) if text else ("killed", f"status {status}")
    return kind, detail


def _answer(target: Target, folder: Path) -> tuple[str, str]:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM_BYTES, mapped + ROOM_BYTES))
    os.chdir(folder)
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            target.use(folder)
    except (ConfigError, TrainingError) as error:
        return "error", str(error)
    except SystemExit as error:
        return ("read" if not error.code else "error"), said.getvalue()[-500:]
    except MemoryError:
        return "memory", traceback.format_exc()[-1500:]
    except BaseException as error:
        memory = isinstance(error, RuntimeError) and "allocate" in str(error)
        return ("memory" if memory else "traceback"), traceback.format_exc()[-1500:]
    return "read", ""


def run_cases(target: Target, count: int, folder: Path, first_seed: int = 0) -> list[Outcome]:
    """`count` damaged copies of a target."""
    place = folder / target.name.replace(" ", "-")
    place.mkdir()
    target.prepare(place)
    sys.stdout.flush()
    sound = shutil.copytree(place, folder / f"{place.name}-sound")
    kind, detail = _apart(target, sound)
    if kind != "read":  # else every error below would be of something else
        raise RuntimeError(f"{target.name}: cannot be read even undamaged: {detail}")
    return [run_case(target, place, seed) for seed in range(first_seed, first_seed + count)]
