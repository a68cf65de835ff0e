"""A batch script for SLURM."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zoo.handover import shell
from zoo.handover.fields import Field
from zoo.handover.hand import Hand
from zoo.handover.launch import Nodes

NOTICE_S = 300
"""Seconds before the end of its time in which a job is told to save and leave."""


def script(hand: Hand, words: Sequence[Field], nodes: Nodes, asked: Sequence[Field] = ()) -> str:
    """A script for `sbatch`: one torchrun a node, which meet on the first one.

    With `--dry-run` every node prints its command instead; outside of a job the script does.

    Args:
        asked: Further options of sbatch: partition, account, time.
    """
    usage = ["sbatch FILE [further settings of zoo train];  bash FILE --dry-run prints the command of a node"]
    lines = [
        "#!/usr/bin/env bash",
        *_options(hand, nodes, asked),
        *shell.head(hand, usage),
        "set -euo pipefail",
        "",
        *shell.sizes(nodes),
        "HOSTS=(localhost)",
        "if [[ ${SLURM_JOB_ID:-} ]]; then",
        '  mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "fi",
        "MASTER_ADDR=${HOSTS[0]:?scontrol names no nodes}  # SLURM: the first node of the job",
        "export MASTER_ADDR MASTER_PORT",
        *shell.RANKS.split("\n"),
        *shell.arguments(words),
        "PER_NODE='exec \"$@\"'  # srun runs this once on each node",
        'RUN=(srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c)',
        "if [[ ${1:-} == --dry-run ]]; then",
        "  [[ ${SLURM_JOB_ID:-} ]] || RUN=(bash -c)",
        '  PER_NODE=\'printf "node %s: " "${SLURM_NODEID:-0}"; printf "%q " "$@"; echo\'',
        "  shift",
        "fi",
        'ARGUMENTS+=("$@")',
        *shell.torchrun("$MASTER_ADDR:$MASTER_PORT", "${SLURM_JOB_ID:-zoo}"),
        'exec "${RUN[@]}" "$PER_NODE" node "${COMMAND[@]}"',
    ]
    return "\n".join(lines) + "\n"


def _options(hand: Hand, nodes: Nodes, asked: Sequence[Field]) -> list[str]:
    """What sbatch reads; it takes everything behind a blank for a part of the value, so comments stand above."""
    name = re.sub(r"[^\w.-]+", "_", f"zoo-{hand.names['model']}")
    gpus = hand.question.machine.chip.device not in (None, "cpu")
    options = [
        ("job-name", name, "user: the model"),
        ("nodes", nodes.count, nodes.origin),
        ("ntasks-per-node", 1, "zoo launch: one torchrun a node"),
        *([("gpus-per-node", nodes.each, nodes.origin)] if gpus else []),
        ("exclusive", None, "zoo launch: a node works for one run"),
        ("output", "%x-%j.out", "zoo launch"),
        ("requeue", None, "zoo launch: a job that lost a node goes on from its last checkpoint"),
        ("signal", f"TERM@{NOTICE_S}", "zoo launch: time to save before the end"),
        *((field.name, field.value, field.origin) for field in asked),
    ]
    lines = []
    for option, value, origin in options:
        lines += [f"# {origin}", f"#SBATCH --{option}" + (f"={value}" if value is not None else "")]
    return lines
