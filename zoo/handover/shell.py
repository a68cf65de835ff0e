"""The lines of shell that all scripts share."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.handover.fields import Field
from zoo.handover.hand import Hand
from zoo.handover.launch import Nodes, in_shell

RANKS = """\
# Nodes get their ranks in the order of their addresses, and processes in the order of their devices: neighbours share a
# node, as the plan assumes."""


def head(hand: Hand, usage: Sequence[str]) -> list[str]:
    """Comments: what this is, and how to use it."""
    lines = [*hand.summary(), "written by zoo launch; a comment behind a setting says who decided it", *usage]
    return [f"# {line}" for line in lines]


def arguments(words: Sequence[Field]) -> list[str]:
    """The array ARGUMENTS of the settings of `zoo train`."""
    texts = [in_shell(word) for word in words]
    width = min(48, max(len(text) for text in texts))
    rows = [f"  {text:<{width}}  # {word.origin}" for text, word in zip(texts, words, strict=True)]
    return ["ARGUMENTS=(", *rows, ")"]


def sizes(nodes: Nodes) -> list[str]:
    """The numbers that torchrun is given."""
    return [
        f"NNODES={nodes.count}  # {nodes.origin}",
        f"NPROC_PER_NODE={nodes.each}  # {nodes.origin}",
        "MAX_RESTARTS=${MAX_RESTARTS:-3}  # zoo launch: a lost process restarts all from the last checkpoint",
        "MASTER_PORT=${MASTER_PORT:-29500}  # zoo launch: torchrun's own",
    ]


def torchrun(endpoint: str, run_id: str) -> list[str]:
    """The array COMMAND: torchrun on one node.

    Args:
        endpoint: `HOST:PORT` of the node where all meet, in shell.
        run_id: A name of the run that all nodes share, in shell.
    """
    return [
        "COMMAND=(",
        '  torchrun --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" --max-restarts="$MAX_RESTARTS"',
        f'  --rdzv-backend=c10d --rdzv-endpoint="{endpoint}" --rdzv-id="{run_id}"',
        '  -m zoo.cli train "${ARGUMENTS[@]}"',
        ")",
    ]
