"""The jobs of a multirun, before any of them starts."""

from __future__ import annotations

from collections.abc import Sequence


def jobs_of(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job that Hydra's basic sweeper makes of `overrides` and of `hydra.sweeper.params`.

    Another sweeper chooses its jobs as it goes: then the result is the one job without what is swept.

    Raises:
        ConfigError: the overrides cannot be read or name options that do not exist.
    """
    from hydra import compose, initialize_config_module
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from zoo.config import explained

    fixed: list[str] = []
    with initialize_config_module("zoo.conf", version_base="1.3"), explained("config", fixed):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(list(overrides))
        fixed += [override.input_line or "" for override in parsed if not override.is_sweep_override()]
        sweeper = compose("config", fixed, return_hydra_config=True).hydra.sweeper
        if not sweeper._target_.endswith(".BasicSweeper"):
            return [fixed]
        params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides([*params, *overrides]), None)
    return [[override for override in job if not override.startswith("hydra.")] for job in jobs]
