"""A task for SkyPilot (https://docs.skypilot.co/en/latest/reference/yaml-spec.html)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from zoo.handover import shell
from zoo.handover.fields import Field
from zoo.handover.hand import Hand
from zoo.handover.launch import Nodes
from zoo.spec.base import ConfigError
from zoo.spec.hardware import ChipSpec

ACCELERATORS = {
    "A100 PCIe 80": "A100-80GB",
    "A100 SXM 80": "A100-80GB",
    "A100 PCIe 40": "A100",
    "A100 SXM 40": "A100",
    "A800": "A800",
    "B200": "B200",
    "GH200": "GH200",
    "H100 NVL": "H100-NVL",
    "H100 PCIe": "H100",
    "H100 SXM 80": "H100",
    "H200 SXM": "H200",
    "L40S": "L40S",
    "MI300X": "MI300X",
    "RTX 3090": "RTX3090",
    "RTX 4090": "RTX4090",
    "RTX 5090": "RTX5090",
    "RTX A6000": "RTXA6000",
}
"""SkyPilot's names by the words of a chip's own (skypilot-catalog@001ca54:catalogs/v8/common/accelerators.csv)."""


def accelerator_of(chip: ChipSpec) -> str:
    """The name that SkyPilot has for a chip.

    Raises:
        ConfigError: none is known.
    """
    for words, name in ACCELERATORS.items():
        if re.search(rf"\b{re.escape(words)}\b", chip.name):
            return name
    raise ConfigError(
        f"accelerator: missing; SkyPilot's name of {chip.name} is not known: give it, accelerator=H100 "
        "(`sky show-gpus --all` lists them)"
    )


def task(hand: Hand, words: Sequence[Field], nodes: Nodes, accelerator: str | None = None) -> str:
    """The YAML file of a task. With DRY_RUN=1 in its environment every node prints its command instead.

    Raises:
        ConfigError: the accelerator is not known.
    """
    chip = hand.question.machine.chip
    name = accelerator or accelerator_of(chip)
    usage = [
        "sky launch FILE, from the folder of the project;  --env DRY_RUN=1 prints the command of every node",
        "sky jobs launch FILE restarts it when a node is lost",
    ]
    lines = [
        *shell.head(hand, usage),
        f"name: {_task_name(hand)}  # user: the model",
        f"num_nodes: {nodes.count}  # {nodes.origin}",
        "workdir: .  # zoo launch: zoo itself is copied to the nodes",
        "",
        "resources:",
        f"  accelerators: {name}:{nodes.each}  # {'user' if accelerator else f'hardware: {chip.name}'}, {nodes.origin}",
        "",
        "envs:",
        '  DRY_RUN: ""  # user',
        "",
        "setup: |",
        "  pip install .",
        "",
        "run: |",
        *(f"  {line}" if line else "" for line in _run(words, nodes)),
    ]
    return "\n".join(lines) + "\n"


def _task_name(hand: Hand) -> str:
    """Letters, digits and dashes, as clusters are named after it."""
    return re.sub(r"[^a-z0-9]+", "-", f"zoo-{hand.names['model']}".lower()).strip("-")


def _run(words: Sequence[Field], nodes: Nodes) -> list[str]:
    return [
        "set -euo pipefail",
        *shell.sizes(nodes),
        "MASTER_ADDR=${SKYPILOT_NODE_IPS%%$'\\n'*}  # SkyPilot: the first node",
        *shell.RANKS.split("\n"),
        *shell.arguments(words),
        *shell.torchrun("$MASTER_ADDR:$MASTER_PORT", "$SKYPILOT_TASK_ID"),
        "if [[ ${DRY_RUN:-} ]]; then",
        "  printf 'node %s: ' \"$SKYPILOT_NODE_RANK\"",
        "  printf '%q ' \"${COMMAND[@]}\"",
        "  echo",
        "  exit",
        "fi",
        'exec "${COMMAND[@]}"',
    ]
