"""Where the weights of a run come from: its description, its tokenizer and its model, out of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.adapt.lora import adapt, adaptable
from zoo.adapt.patterns import matching
from zoo.decoder import Decoder, build
from zoo.hf.family import differences
from zoo.hf.parameters import Parameters, StoredParameters
from zoo.hf.source import Source, open_checkpoint
from zoo.hf.tokenizer import TOKENIZER, end_of_text
from zoo.spec.base import ConfigError, decode
from zoo.spec.finetune import FromCheckpoint, FullFinetune, LoraFinetune
from zoo.spec.model import ModelSpec
from zoo.spec.run import RunSpec
from zoo.upcycling import UpcycledParameters, upcycled_spec

_WHOLE = {"d_model", "layers", "kinds"}
"""Settings that hold all of these describe a whole model."""


def model_of(finetune: FromCheckpoint, given: Mapping[str, Any], name: str | None) -> ModelSpec:
    """The description of a run's model.

    Args:
        given: what the settings say below `model`: a whole model if one was chosen by name, else changes.
        name: of the model that was chosen, unless `given` says it.

    Raises:
        ConfigError: the checkpoint cannot be read, its weights do not fill the model, the chosen model computes
            something else, or a pattern fits nothing.
    """
    source = open_checkpoint(finetune.path)
    own = source.spec
    if own.name == "unnamed":
        own = own.replace(name=Path(finetune.path).stem or "unnamed")
    upcycle = finetune.upcycle if isinstance(finetune, FullFinetune) else None
    if upcycle is not None:
        balance = {"balance": {"aux_loss": upcycle.aux_loss}}
        own = upcycled_spec(own, upcycle.num_experts, upcycle.top_k, upcycle.granularity, balance)
    if given.keys() >= _WHOLE:
        spec = decode(ModelSpec, {"name": name, **given} if name else given, "model")
        _refuse_another(spec, own, finetune.path)
    else:
        spec = decode(ModelSpec, _merged(own.to_dict(), given), "model") if given else own
    if upcycle is None:
        source.plan(spec)
    _check_patterns(finetune, spec)
    return spec


def tokenizer_of(path: str, separator: str | None) -> dict[str, Any]:
    """The settings of a checkpoint's tokenizer.

    Args:
        separator: the token that ends a document; None: what the checkpoint ends a text with.

    Raises:
        ConfigError: there is none beside the weights, or nothing says how a text ends.
    """
    source = open_checkpoint(path)
    own = source.config.get("tokenizer") if source.family is None else None
    if isinstance(own, Mapping):
        return {**own, **({} if separator is None else {"separator": separator})}
    place = source.path.parent if source.path.is_file() else source.path
    if not (place / TOKENIZER).is_file():
        advice = "zoo convert writes a directory that holds one; or name another: tokenizer=file tokenizer.path=..."
        raise ConfigError(f"tokenizer: found no {TOKENIZER} beside {source.path}; {advice}")
    return {"type": "file", "path": str(place), "separator": separator or end_of_text(source)}


def initial_model(run: RunSpec, dtype: torch.dtype) -> Decoder:
    """The model of a run as it starts, on the CPU: what is not trained asks for no gradient.

    What is random is drawn from torch's generator.
    """
    finetune = run.finetune
    if not isinstance(finetune, FromCheckpoint):
        return build(run.model, dtype=dtype)
    model = build(run.model, dtype=dtype, init=False)
    parameters = _parameters(run, open_checkpoint(finetune.path), finetune)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            target.copy_(parameters[name])
    if isinstance(finetune, LoraFinetune):
        adapt(model, finetune)
    elif isinstance(finetune, FullFinetune):
        frozen = _frozen(model, finetune)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    return model


def _parameters(run: RunSpec, source: Source, finetune: FromCheckpoint) -> Parameters:
    upcycle = finetune.upcycle if isinstance(finetune, FullFinetune) else None
    if upcycle is None:
        return StoredParameters(source, run.model)
    dense = StoredParameters(source, source.spec)
    return UpcycledParameters(dense, dense.dtypes, run.model, upcycle.granularity, run.train.seed)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `changes` says in its place, key by key."""
    result = dict(base)
    for key, value in changes.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _merged(below, value)
        result[key] = value
    return result


def _refuse_another(chosen: ModelSpec, own: ModelSpec, path: str) -> None:
    """Raise unless two descriptions say the same computation."""
    if chosen.num_layers != own.num_layers:
        faults = [f"num_layers: {chosen.num_layers}, there {own.num_layers}"]
    else:
        faults = list(differences(chosen, own))
    if faults:
        listed = "\n  ".join(faults[:10])
        raise ConfigError(
            f"model: found {chosen.name}; the checkpoint {path} holds another model; leave model=... out, and change "
            f"options of what it holds with model.KEY=...\n  {listed}"
        )


def _check_patterns(finetune: FromCheckpoint, spec: ModelSpec) -> None:
    model = build(spec, "meta")
    if isinstance(finetune, LoraFinetune):
        matching(finetune.targets, list(dict(adaptable(model))), "finetune.targets", "matrices inside layers")
    elif isinstance(finetune, FullFinetune):
        _frozen(model, finetune)


def _frozen(model: Decoder, finetune: FullFinetune) -> set[str]:
    """The parameters that are not to be trained.

    Raises:
        ConfigError: a pattern matches none, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = matching(finetune.freeze, names, "finetune.freeze", "parameters")
    if all(name in frozen for name, parameter in model.named_parameters() if parameter.requires_grad):
        raise ConfigError(f"finetune.freeze: found {list(finetune.freeze)}; leaves nothing to train")
    return frozen
