"""What comes from outside of this package: blocks, and folders of configurations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from zoo.spec.base import ConfigError, TypedSpec, register_mirror, register_spec

ENTRY_POINTS = "zoo.blocks"
"""Installed packages name a function without arguments in this group; it calls `register` for what they bring."""

_FOLDERS: dict[Path, None] = {}


def register(
    spec: type[TypedSpec] | None = None,
    *,
    module: type[Any] | str | None = None,
    cost: type[Any] | str | None = None,
    configs: str | Path | None = None,
) -> None:
    """Make an outside block or a folder of configurations known.

    Args:
        spec: The description of a block, a subclass of `MixerSpec` or `FFNSpec` with its own `type`; or one of a part
            of a block, such as a `RouterSpec`.
        module: The `Block` that computes it, as a class or as `"package.file:Class"`, which is imported when a model is
            built. None: the one class beside `spec`, in the same file, that describes itself by it.
        cost: The `Cost` that counts it, in the same ways.
        configs: A folder laid out like `conf/`, with files such as `model/my_model.yaml`; names of zoo's own win.

    Raises:
        ConfigError: the folder has no such files.
        ValueError: another block has that `type`.
    """
    if spec is not None:
        register_spec(spec)
        for floor, counterpart in (("blocks", module), ("plan", cost)):
            if counterpart is not None:
                register_mirror(floor, spec, counterpart)
    elif module is not None or cost is not None:
        raise TypeError("give the spec that the module and the cost belong to")
    if configs is not None:
        _add_folder(Path(configs).absolute())


def config_folders() -> list[Path]:
    """The folders of configurations: zoo's own, then those registered, in the order in which Hydra looks."""
    import zoo.conf

    return [Path(zoo.conf.__file__ or "").parent, *_FOLDERS]


@cache
def load_entry_points() -> None:
    """Let installed packages register what they bring, once.

    Raises:
        ConfigError: one of them cannot be loaded.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()()
        except Exception as error:
            owner = entry.dist.name if entry.dist else "a package"
            raise ConfigError(
                f"entry point {entry.name} = {entry.value} of {owner}: {type(error).__name__}: {error}; "
                "mend or uninstall that package"
            ) from error


def take_config_dirs(arguments: Sequence[str]) -> list[str]:
    """Register the folders of `--config-dir DIR`, Hydra's own flag; the arguments without them."""
    rest: list[str] = []
    flags = iter(arguments)
    for argument in flags:
        name, equals, value = argument.partition("=")
        if name not in ("--config-dir", "-cd"):
            rest.append(argument)
            continue
        folder = value if equals else next(flags, "")
        if not folder:
            raise ConfigError(f"{name}: missing; name a folder laid out like conf/")
        register(configs=folder)
    return rest


def _add_folder(folder: Path) -> None:
    if not any(folder.glob("*/*.yaml")):
        what = "there is no such folder" if not folder.is_dir() else "it holds no files such as model/my_model.yaml"
        raise ConfigError(f"configs: found '{folder}'; {what}; name a folder laid out like conf/")
    _join_search_path()
    _FOLDERS[folder] = None


@cache
def _join_search_path() -> None:
    """Have Hydra look into the registered folders, in applications of other makers too."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class RegisteredFolders(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for folder in _FOLDERS:
                search_path.append(provider="zoo.register", path=f"file://{folder}")

    Plugins.instance().register(RegisteredFolders)
