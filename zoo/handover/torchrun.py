"""A script for one computer, or for every one of several."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.handover import shell
from zoo.handover.fields import Field
from zoo.handover.hand import Hand
from zoo.handover.launch import Nodes


def script(hand: Hand, words: Sequence[Field], nodes: Nodes) -> str:
    """A bash script that starts torchrun; with `--dry-run` it prints the command instead."""
    usage = ["bash FILE [--dry-run] [further settings of zoo train]"]
    if nodes.count > 1:
        usage.append(f"on each of {nodes.count} nodes: MASTER_ADDR=FIRST_NODE RUN_ID=NAME bash FILE")
    single = nodes.count == 1
    address = "localhost" if single else "${MASTER_ADDR:?name one of the nodes}"
    lines = [
        "#!/usr/bin/env bash",
        *shell.head(hand, usage),
        "set -euo pipefail",
        "",
        *shell.sizes(nodes),
        *([] if single else shell.RANKS.split("\n")),
        *shell.arguments(words),
        "DRY_RUN=",
        "if [[ ${1:-} == --dry-run ]]; then",
        "  DRY_RUN=1",
        "  shift",
        "fi",
        'ARGUMENTS+=("$@")',
        *shell.torchrun(f"{address}:$MASTER_PORT", "${RUN_ID:-zoo}"),
        "if [[ $DRY_RUN ]]; then",
        "  printf '%q ' \"${COMMAND[@]}\"",
        "  echo",
        "  exit",
        "fi",
        'exec "${COMMAND[@]}"',
    ]
    return "\n".join(lines) + "\n"
