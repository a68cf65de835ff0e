"""Rotary positions: `rope_theta` and `rope_scaling` as on the hub, `rope_parameters` as in transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zoo.hf.keys import Keys, refused
from zoo.hf.rows import Tree
from zoo.spec.base import ConfigError

_ORIGINAL = {"original_max_position_embeddings": "original_context"}
# For each rope type the config keys and the fields of the scaling of the same name.
SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        **_ORIGINAL,
    },
    "yarn": {
        "factor": "factor",
        **{name: name for name in ("beta_fast", "beta_slow", "truncate")},
        **{name: name for name in ("mscale", "mscale_all_dim", "attention_factor")},
        **_ORIGINAL,
    },
    "longrope": {
        "factor": "factor",
        **{name: name for name in ("short_factor", "long_factor", "attention_factor")},
        **_ORIGINAL,
    },
}
# Types whose original length is max_position_embeddings unless they say another one, and whose factor, when null, is
# the ratio of the two.
_STRETCHED = ("llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a slot."""

    slot: str = "attention"

    def read(self, keys: Keys, model: Tree) -> None:
        theta = keys.take("rope_theta")
        parameters = _merged(keys)
        theta = parameters.pop("rope_theta", None) or theta
        model.set(f"{self.slot}.rope.theta", theta)
        old_type, new_type = parameters.pop("type", None), parameters.pop("rope_type", None)
        kind = new_type or old_type or "default"
        if old_type and new_type and old_type != new_type:
            raise refused("rope_scaling.type", old_type, f"differs from rope_type ({new_type!r})")
        scaling = None if kind == "default" else _read_scaling(kind, parameters, keys)
        if parameters:
            name, value = next(iter(parameters.items()))
            raise refused(f"rope_scaling.{name}", value, f"not understood for rope_type {kind!r}")
        model.set(f"{self.slot}.rope.scaling", scaling)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        rope = model.get(f"{self.slot}.rope") or {}
        config["rope_theta"] = rope.get("theta")
        config["rope_scaling"] = None
        scaling = rope.get("scaling")
        if scaling is None or scaling["type"] not in SCALINGS:
            return
        fields = SCALINGS[scaling["type"]]
        written = {key: scaling[name] for key, name in fields.items() if scaling[name] is not None}
        config["rope_scaling"] = {"rope_type": scaling["type"], **written}
        if scaling["type"] == "dynamic":
            config["max_position_embeddings"] = scaling["original_context"]
        elif scaling["type"] in _STRETCHED and model.get("card.context") is None:
            config["max_position_embeddings"] = round(scaling["original_context"] * scaling["factor"])


def _merged(keys: Keys) -> dict[str, Any]:
    """The parameters of both spellings together; where both give one, they must agree."""
    merged: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        found = keys.take(key, None)
        if found is None:
            continue
        if not isinstance(found, Mapping):
            raise refused(key, found, "must be an object")
        for name, value in found.items():
            if merged.setdefault(name, value) != value:
                raise ConfigError(f"config.json: rope_parameters and rope_scaling differ in {name}; remove one of them")
    return merged


def _read_scaling(kind: str, parameters: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """The scaling as plain data; what is understood is removed from `parameters`."""
    if kind not in SCALINGS:
        raise refused("rope_scaling.rope_type", kind, f"understood: default, {', '.join(SCALINGS)}")
    fields = SCALINGS[kind]
    found = {name: parameters.pop(key) for key, name in fields.items() if parameters.get(key) is not None}
    for key in fields:
        parameters.pop(key, None)
    context = keys.take("max_position_embeddings")
    if kind == "dynamic":
        found["original_context"] = context
    if kind in _STRETCHED:
        found.setdefault("original_context", context)
        if "factor" not in found and isinstance(context, int) and isinstance(found["original_context"], int):
            found["factor"] = context / max(found["original_context"], 1)
    return {"type": kind, **found}
