"""Rotary positions: `rope_theta` and `rope_scaling` as on the hub, `rope_parameters` as in transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.hf.keys import ABSENT, Keys, refused
from zoo.hf.rows import Tree
from zoo.spec.base import ConfigError

_ORIGINAL = {"original_max_position_embeddings": "original_context"}
_OURS = {"llama3": "bands"}
"""Rope types whose scaling has another name here."""
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
# For each rope type the config keys and the fields of its scaling.
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
    "proportional": {"partial_rotary_factor": "fraction", "factor": "factor"},
}
# Types whose original length is max_position_embeddings unless they say another one, and whose factor, when null, is
# the ratio of the two.
_STRETCHED = ("llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a slot."""

    slot: str = "attention"
    fraction: bool = False
    """The family has `partial_rotary_factor`."""
    query_scale: bool = False
    """The family has `llama_4_scaling_beta`."""
    original: str | None = None
    """A key beside the parameters that holds their original length."""
    nested: bool = False
    """Write `rope_parameters`, also for the hub."""
    scaled: bool = False
    """The family takes some scaling where a config does not say that there is none."""
    without_effect: tuple[str, ...] = ()
    """Parameters that follow from other keys."""
    rotary_dim: str | None = None
    """A key for the number of channels that turn, in place of `partial_rotary_factor`."""
    mscales: bool = False
    """Temperatures of a longrope are called `long_mscale` and `short_mscale`."""
    alpha: bool = False
    """A dynamic scaling that has an `alpha` is the static one of that name."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Old names of types."""

    def read(self, keys: Keys, model: Tree) -> None:
        theta = keys.take("rope_theta", None if self.nested else ABSENT)
        found = _merged(keys) or keys.default("rope_parameters") or {}
        parameters = {name: value for name, value in found.items() if name not in self.without_effect}
        parameters.setdefault("rope_theta", theta if theta is not None else keys.default("rope_theta"))
        if self.rotary_dim is not None and (width := keys.take(self.rotary_dim)) is not None:
            parameters.setdefault("partial_rotary_factor", width / model.get(f"{self.slot}.head_dim"))
        if self.fraction:
            parameters.setdefault("partial_rotary_factor", keys.take("partial_rotary_factor"))
        if self.original is not None:
            parameters["original_max_position_embeddings"] = keys.take(self.original)
        for name in ("type", "rope_type"):
            if parameters.get(name) in self.aliases:
                parameters[name] = self.aliases[parameters[name]]
        further = self._own_words(parameters)
        beta = parameters.pop("llama_4_scaling_beta", None) if self.query_scale else None
        rope = _read_rope(parameters, keys, self.fraction)
        if further:
            rope["scaling"] = {**(rope["scaling"] or {}), **further}
        for name, value in rope.items():
            model.set(f"{self.slot}.rope.{name}", value)
        if self.query_scale:
            scaling = rope["scaling"] or {}
            scale = {"beta": beta, "original_context": scaling.get("original_context")}
            model.set(f"{self.slot}.query_scale", scale if beta is not None else None)

    def _own_words(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Fields of the scaling that the family has words of its own for; those are removed."""
        kind = parameters.get("rope_type") or parameters.get("type")
        if self.mscales and kind == "longrope":
            names = {"attention_factor": "long_mscale", "short_attention_factor": "short_mscale"}
            return {ours: parameters.pop(theirs, None) for ours, theirs in names.items()}
        if self.alpha and kind == "dynamic" and parameters.get("alpha"):
            found = {"type": "ntk_alpha", "alpha": parameters["alpha"]}
            # Of the dynamic scaling and of YaRN; the static one has no use for them.
            unused = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "alpha", "type", "rope_type")
            for name in unused:
                parameters.pop(name, None)
            return found
        return {}

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        rope = model.get(f"{self.slot}.rope") or {}
        config["rope_theta"] = rope.get("theta")
        config["rope_scaling"] = _write_scaling(rope.get("scaling"), model, config)
        scaling = rope.get("scaling") or {"type": None}
        if self.mscales and scaling["type"] == "longrope":
            config["rope_scaling"].pop("attention_factor", None)
            long, short = scaling["attention_factor"], scaling["short_attention_factor"]
            config["rope_scaling"] |= {"long_mscale": long, "short_mscale": short}
        if self.alpha and scaling["type"] == "ntk_alpha":
            dynamic = {"rope_type": "dynamic", "type": "dynamic", "factor": 1.0}
            config["rope_scaling"] = {**dynamic, "alpha": scaling["alpha"]}
        if self.rotary_dim is not None and (head_dim := model.get(f"{self.slot}.head_dim")):
            config[self.rotary_dim] = int(head_dim * rope.get("fraction", 1.0))
        if self.fraction:
            config["partial_rotary_factor"] = rope.get("fraction")
        if self.original is not None and rope.get("scaling"):
            config[self.original] = rope["scaling"].get("original_context")
        if self.scaled and config["rope_scaling"] is None:
            config["rope_scaling"] = {"rope_type": "default"}
        if self.nested:
            parameters = config.pop("rope_scaling") or {"rope_type": "default"}
            if query_scale := model.get(f"{self.slot}.query_scale"):
                parameters["llama_4_scaling_beta"] = query_scale["beta"]
            config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **parameters}


@dataclass(frozen=True)
class RopeByType:
    """Rotary embeddings that differ between layer types: `rope_parameters` holds one object for each type.

    On the hub, older configs say the same by a base for each type, and a scaling for some of them.
    """

    slots: Mapping[str, str]
    """Layer type to slot."""
    thetas: Mapping[str, str] = field(default_factory=dict)
    """Layer type to the hub's key for its base, where there is one; without it, objects are all there is."""
    scaled: tuple[str, ...] = ("full_attention",)
    """Types that the hub's `rope_scaling` speaks of."""
    fraction: bool = False
    """The family has `partial_rotary_factor`."""

    def read(self, keys: Keys, model: Tree) -> None:
        by_type = keys.take("rope_parameters", None)
        if by_type is None:
            by_type = {} if self.thetas else keys.default("rope_parameters")
        if not isinstance(by_type, Mapping) or not all(isinstance(found or {}, Mapping) for found in by_type.values()):
            raise refused("rope_parameters", by_type, f"must be an object of objects for {', '.join(self.slots)}")
        if unknown := [name for name in by_type if name not in self.slots]:
            raise refused(f"rope_parameters.{unknown[0]}", by_type[unknown[0]], f"understood: {', '.join(self.slots)}")
        scaling = keys.take("rope_scaling", None) or {}
        for layer_type, slot in self.slots.items():
            parameters = dict(by_type.get(layer_type) or {})
            if layer_type in self.thetas:
                parameters.setdefault("rope_theta", keys.take(self.thetas[layer_type]))
                if self.fraction and "partial_rotary_factor" in keys.config:
                    parameters.setdefault("partial_rotary_factor", keys.take("partial_rotary_factor"))
            if layer_type in self.scaled:
                parameters |= scaling
            if not parameters:
                continue
            for name, value in _read_rope(parameters, keys, self.fraction).items():
                model.set(f"{slot}.rope.{name}", value)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        config["rope_parameters"] = by_type = {}
        for layer_type, slot in self.slots.items():
            rope = model.get(f"{slot}.rope")
            if rope is None:
                continue
            scaling = _write_scaling(rope.get("scaling"), model, config) or {"rope_type": "default"}
            by_type[layer_type] = {**scaling, "rope_theta": rope.get("theta")}
            if self.fraction:
                by_type[layer_type].setdefault("partial_rotary_factor", rope.get("fraction"))
            if layer_type in self.thetas:
                config[self.thetas[layer_type]] = rope.get("theta")


def _read_rope(parameters: dict[str, Any], keys: Keys, fraction: bool) -> dict[str, Any]:
    """`RopeSpec` as plain data; parameters that are not understood are refused."""
    rope: dict[str, Any] = {"theta": parameters.pop("rope_theta", None) or keys.default("rope_theta")}
    old_type, new_type = parameters.pop("type", None), parameters.pop("rope_type", None)
    kind = new_type or old_type or "default"
    if old_type and new_type and old_type != new_type:
        raise refused("rope_scaling.type", old_type, f"differs from rope_type ({new_type!r})")
    if fraction and kind != "proportional":
        rope["fraction"] = parameters.pop("partial_rotary_factor", None) or 1.0
    rope["scaling"] = None
    if kind == "default":
        parameters.pop("original_max_position_embeddings", None)
    else:
        rope["scaling"] = _read_scaling(kind, parameters, keys)
    if parameters:
        name, value = next(iter(parameters.items()))
        raise refused(f"rope_scaling.{name}", value, f"not understood for rope_type {kind!r}")
    return rope


def _write_scaling(scaling: Any, model: Tree, config: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling in the hub's words; a length that it needs beside it goes to the config."""
    kind = scaling and _THEIRS.get(scaling["type"], scaling["type"])
    if scaling is None or kind not in SCALINGS:
        return None
    fields = SCALINGS[kind]
    written = {key: scaling[name] for key, name in fields.items() if scaling[name] is not None}
    if scaling["type"] == "dynamic":
        config["max_position_embeddings"] = scaling["original_context"]
    elif kind in _STRETCHED and model.get("card.context") is None:
        config["max_position_embeddings"] = round(scaling["original_context"] * scaling["factor"])
    return {"rope_type": kind, **written}


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
    return {"type": _OURS.get(kind, kind), **found}
