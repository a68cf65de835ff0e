"""Data sets of the library datasets: from a directory, or from the Hugging Face Hub when that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.data.formats import Record, parts_of
from zoo.data.paths import what_is_there
from zoo.spec.base import ConfigError, near
from zoo.spec.data import HFData

_ROWS = 256


def find(data: HFData) -> Path:
    """The directory of a local data set, or its name on the Hub, which is not asked here.

    Raises:
        ConfigError: no data set there.
    """
    path = Path(data.path).expanduser()
    if data.online:
        return Path(data.path)
    if not path.is_dir():
        advice = f"{what_is_there(path)}; to look for it on the Hub: data.online=true"
        raise ConfigError(f"data.path: found {data.path!r}; there is no directory {path}; {advice}")
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        rule = "not a directory that save_to_disk of the library datasets wrote"
        raise ConfigError(f"data.path: found {data.path!r}; {rule}; files of text are read with data=files")
    return path


def identity(data: HFData) -> list[Any]:
    """What changes when the data set does: the commit on the Hub, or the files of a directory."""
    if not data.online:
        root = find(data)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        stats = [(path.relative_to(root).as_posix(), path.stat()) for path in files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    from huggingface_hub import HfApi

    with _explained(data):
        return [HfApi().dataset_info(data.path, revision=data.revision).sha]


def read(data: HFData, split: str, keys: tuple[str, ...], skip: int) -> Iterator[Record]:
    """The rows of a split after the first `skip`.

    Raises:
        ConfigError: it cannot be opened, or has no such split or column.
    """
    with _explained(data):
        rows = _open(data, split)
        names = rows.column_names
        for place, key in enumerate(reversed(keys)):
            if names is not None and key not in names:
                setting = "data.prompt_key" if place else "data.text_key"
                hint = near(key, names) or f"columns: {', '.join(names)}"
                raise ConfigError(f"{setting}: found {key!r}; no such column in {data.path}; {hint}")
        if names is not None:
            rows = rows.select_columns(list(keys))
        number, most, num_bytes = skip, data.max_documents, 0
        for batch in rows.skip(skip).iter(batch_size=_ROWS):
            for values in zip(*(batch[key] for key in keys), strict=True):
                if most is not None and number >= most:
                    return
                found = parts_of(dict(zip(keys, values, strict=True)), keys, "column")
                num_bytes += 0 if isinstance(found, str) else sum(len(text) for text, _ in found)
                yield number, num_bytes, found
                number += 1


def _open(data: HFData, split: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        advice = "pip install 'moe-zoo[data]'"
        raise ConfigError(f"data.type: found 'hf'; needs the package datasets; {advice}") from None
    if data.online:
        return datasets.load_dataset(
            data.path, data.name, split=split, revision=data.revision, streaming=data.streaming
        )
    found = datasets.load_from_disk(str(find(data)))
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ConfigError(f"data.split: found {split!r}; splits of {data.path}: {', '.join(found)}")
        return found[split]
    if split not in ("train", str(found.split)):
        raise ConfigError(f"data.split: found {split!r}; {data.path} is one split, {found.split or 'train'}")
    return found


@contextmanager
def _explained(data: HFData) -> Iterator[None]:
    """What the libraries raise becomes one ConfigError: they know no common exception."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        place = "from the Hub" if data.online else "as a data set"
        raise ConfigError(f"data.path: found {data.path!r}; cannot be read {place}: {reason}") from error
