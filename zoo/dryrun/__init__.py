"""A training step rehearsed on any machine: the real model, really spread, as one process of many, without values."""

from zoo.dryrun.run import Collective, DryRun, dry_run

__all__ = ["Collective", "DryRun", "dry_run"]
