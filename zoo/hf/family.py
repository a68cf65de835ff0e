"""A family of Hugging Face models: its config table and its weight table, and the two directions of the former."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.hf.homes import Home, Rows
from zoo.hf.keys import IGNORED, Keys
from zoo.hf.layers import Layers
from zoo.hf.mtp import MTPNames
from zoo.hf.rows import Row, Tree
from zoo.hf.weights import JointRow, WeightRow
from zoo.spec.base import ConfigError, decode, near
from zoo.spec.block import BlockSpec
from zoo.spec.model import KindSpec, ModelSpec
from zoo.spec.pattern import compress, expand


class WrongBlocks(ConfigError):
    """The layers hold blocks that the family has no place for."""


@dataclass(frozen=True)
class Slot:
    """A block that layers of the family may hold."""

    spec: type[BlockSpec]
    when: Mapping[str, Any] = field(default_factory=dict)
    """Fields, by dotted paths, that tell it from other slots of its type."""
    like: str | None = None
    """Another slot; fields that no row gives are taken from there."""
    weights: Callable[[Any], Iterable[WeightRow | JointRow]] | None = None
    """Statements on its parameters that follow from its numbers or that do not hold for other blocks."""

    def fits(self, block: BlockSpec) -> bool:
        described = Tree(block.to_dict())
        return isinstance(block, self.spec) and all(described.get(path) == value for path, value in self.when.items())


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers, as data."""

    model_type: str
    architecture: str
    slots: Mapping[str, Slot]
    layers: Layers
    rows: tuple[Row, ...]
    weights: tuple[WeightRow | JointRow, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the class in transformers takes for keys that a config.json may leave out."""
    tied_head: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    """Names of the head and of the embedding: where they are tied, a checkpoint may hold both or the latter alone."""
    ignored_weights: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    """Patterns of stored tensors that are no weights."""
    nested: tuple[str, ...] = ()
    """Keys that hold objects; tables call their keys `object.key`."""
    layouts: tuple[Mapping[str, str], ...] = ()
    """How names begin in the tables, and how in checkpoints of another layout, which are told by the first entry. With
    a dot before it, what stands inside of names."""
    zeros: tuple[str, ...] = ()
    """Patterns of stored buffers that a checkpoint may lack: then they are zero."""
    aliases: tuple[str, ...] = ()
    """Further names of the same architecture in configs; they are not written."""
    mtp: MTPNames | None = None
    """Stored names of the blocks of multi-token prediction."""

    def read(self, config: Mapping[str, Any]) -> ModelSpec:
        """The model that a config.json describes.

        Raises:
            ConfigError: keys that are missing, not understood, or refused.
        """
        keys = Keys(dict(self._flat(config)), self.defaults)
        model = Tree()
        model.set("card", {"family": self.model_type, "source": "config.json"})
        for row in self.rows:
            row.read(keys, model)
        layers = self.layers.read(keys)
        if unknown := keys.untaken():
            advice = near(unknown[0], keys.taken) or "remove what changes nothing"
            raise ConfigError(
                f"config.json: not understood for model_type {self.model_type!r}: {', '.join(unknown)}; {advice}"
            )
        further = expand(mtp["layers"]) if (mtp := model.get("mtp")) else ()
        kinds = {name: self.layers.kinds[name] for name in dict.fromkeys([*layers, *further])}
        options = {name: self.layers.options.get(name, {}) for name in kinds}
        used = {slot for name, pair in kinds.items() for slot in (*pair, options[name].get("beside")) if slot}
        described = {name: self._block(name, model) for name in self.slots if name in used}
        trunk = {name: value for name, value in model.data.items() if name not in self.slots}
        kind_specs = {name: {"mixer": mixer, "ffn": ffn, **options[name]} for name, (mixer, ffn) in kinds.items()}
        whole = {**trunk, "slots": described, "kinds": kind_specs, "layers": compress(tuple(layers))}
        return decode(ModelSpec, whole, "model")

    def _flat(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in config.items():
            if name in self.nested and isinstance(value, Mapping):
                # An object of a class of its own, which names itself.
                yield from ((f"{name}.{key}", inner) for key, inner in value.items() if key not in IGNORED)
            else:
                yield name, value

    def _folded(self, config: dict[str, Any]) -> dict[str, Any]:
        for name in self.nested:
            inside = [key for key in config if key.startswith(f"{name}.")]
            config[name] = {key.removeprefix(f"{name}."): config.pop(key) for key in inside}
        return config

    def _block(self, name: str, model: Tree) -> dict[str, Any]:
        slot = self.slots[name]
        shared = model.data.get(slot.like, {}) if slot.like else {}
        return {"type": slot.spec.model_fields["type"].default, **_overlaid(shared, model.data.get(name, {}))}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """The config.json of a model.

        Raises:
            ConfigError: the family cannot express the model; one line for each reason.
        """
        pairs, slots = self._assigned(spec)
        model = Tree({**spec.to_dict(), **{name: block.to_dict() for name, block in slots.items()}})
        for name, slot in self.slots.items():
            if slot.like and name in slots and slot.like not in slots:
                model.data[slot.like] = model.data[name]
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for row in self.rows:
            row.write(model, config)
        self.layers.write(pairs, config)
        # Special tokens belong to a tokenizer; null keeps transformers from assuming those of its class.
        config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        config = self._folded(config)
        try:
            said = self.read(config)
        except ConfigError as error:  # farther off than what reads as another model
            raise WrongBlocks(str(error)) from None
        if reasons := list(differences(spec, said)):
            raise ConfigError("\n".join(reasons))
        return config

    def _assigned(self, spec: ModelSpec) -> tuple[list[tuple[str | None, str | None]], dict[str, BlockSpec]]:
        """The family's slots that every layer uses, and what each of them is."""
        slots: dict[str, BlockSpec] = {}

        def assign(name: str | None) -> str | None:
            if name is None:
                return None
            block = spec.slots[name]
            fitting = [slot for slot, described in self.slots.items() if described.fits(block)]
            if not fitting:
                raise WrongBlocks(f"{name}: no layer of it holds such a block ({block.type})")
            if slots.setdefault(fitting[0], block) != block:
                raise WrongBlocks(f"{name}: must be the same in all layers that have one")
            return fitting[0]

        names = list(dict.fromkeys([*spec.layer_kinds, *_mtp_kinds(spec)]))
        kinds = {name: (assign(spec.kinds[name].mixer), assign(spec.kinds[name].ffn)) for name in names}
        for name in names:
            assign(spec.kinds[name].beside)
        return [kinds[name] for name in spec.layer_kinds], slots

    def homes(self, spec: ModelSpec, held: Iterable[str] = ()) -> dict[str, Home]:
        """Where a checkpoint holds the trunk and the layers, by what names of their parameters begin with.

        Args:
            held: the names of its tensors, by which its layout is told; without them it is that of the hub.
        """
        held = tuple(held)
        rename = next((layout for layout in self.layouts if _told(layout, held)), {})
        rows = {name: self._rows(spec, spec.kinds[name]) for name in {*spec.layer_kinds, *_mtp_kinds(spec)}}
        homes = {"": Home(rename=rename)}
        homes |= {f"layers.{n}.": Home(str(n), rows[kind], rename) for n, kind in enumerate(spec.layer_kinds)}
        if spec.mtp is not None and spec.mtp.enabled:
            if self.mtp is None:
                raise ConfigError(f"mtp: enabled; {self.model_type} has no names for its blocks, switch it off")
            homes |= self.mtp.homes(spec, rows)
        return homes

    def _rows(self, spec: ModelSpec, kind: KindSpec) -> Rows:
        """The statements that hold in layers of a kind alone."""
        blocks = [spec.slots[name] for name in (kind.mixer, kind.ffn, kind.beside) if name is not None]
        slots = [(next((slot for slot in self.slots.values() if slot.fits(block)), None), block) for block in blocks]
        return tuple(row for slot, block in slots if slot and slot.weights for row in slot.weights(block))

    def left_out(self, spec: ModelSpec) -> list[str]:
        """Patterns of stored tensors that are no weights of the model."""
        return [*self.ignored_weights, *(self.mtp.left_out(spec) if self.mtp else ())]


def _told(layout: Mapping[str, str], held: Iterable[str]) -> bool:
    """Whether names are of a layout; its first entry tells."""
    here, there = next(iter(layout.items()))
    return any(there in name if here.startswith(".") else name.startswith(there) for name in held)


def _overlaid(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested data with another's fields in its place, field by field."""
    both = {name for name, value in over.items() if isinstance(value, Mapping) and isinstance(under.get(name), Mapping)}
    return {**under, **over, **{name: _overlaid(under[name], over[name]) for name in both}}


# What a config.json says nothing about or what acts only in training: no reason to refuse a model.
_NOT_COMPARED = {"name", "card", "slots", "kinds", "layers", "init", "norm_placement"}


def differences(wanted: ModelSpec, got: ModelSpec) -> Iterator[str]:
    """How the computations of two models differ, one line each; names of slots and layers do not matter."""
    yield from _unequal("", _trunk(wanted), _trunk(got))
    further = zip(_mtp_kinds(wanted), _mtp_kinds(got), strict=False)
    for ours, theirs in dict.fromkeys([*zip(wanted.layer_kinds, got.layer_kinds, strict=True), *further]):
        kind, other = wanted.kinds[ours], got.kinds[theirs]
        for branch in ("mixer", "ffn", "beside"):
            name, counterpart = getattr(kind, branch), getattr(other, branch)
            yield from _unequal(name or f"kinds.{ours}.{branch}", _block(wanted, name), _block(got, counterpart))
        yield from _unequal(f"kinds.{ours}", _placements(wanted, kind), _placements(got, other))


def _trunk(spec: ModelSpec) -> dict[str, Any]:
    compared = ModelSpec.model_fields.keys() - _NOT_COMPARED
    mtp = spec.mtp and {"blocks": spec.mtp.num_blocks, "num_layers": len(_mtp_kinds(spec))}
    return {name: value for name, value in spec.to_dict().items() if name in compared} | {"mtp": mtp}


def _mtp_kinds(spec: ModelSpec) -> tuple[str, ...]:
    """The kinds of the layers of one block of multi-token prediction."""
    return expand(spec.mtp.layers) if spec.mtp else ()


def _block(spec: ModelSpec, name: str | None) -> Any:
    return None if name is None else {**spec.slots[name].to_dict(), "balance": None, "chunk_size": None}


def _placements(spec: ModelSpec, kind: KindSpec) -> dict[str, str]:
    placements: dict[str, str] = {}
    if kind.mixer is not None:
        placements["placement"] = spec.placement_of(kind)
    if kind.ffn is not None:
        placements["ffn_placement"] = spec.ffn_placement_of(kind)
    return placements


def _unequal(path: str, wanted: Any, got: Any) -> Iterator[str]:
    if isinstance(wanted, Mapping) and isinstance(got, Mapping):
        for name in dict.fromkeys([*wanted, *got]):
            yield from _unequal(f"{path}.{name}".strip("."), wanted.get(name), got.get(name))
    elif wanted != got:
        shown = [value.get("type", "something") if isinstance(value, Mapping) else value for value in (wanted, got)]
        yield f"{path}: {shown[0]!r} here, {shown[1]!r} there"
