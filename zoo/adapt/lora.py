"""Adapters of low rank (LoRA) in a whole model: put in, taken out, merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapt.patterns import matching
from zoo.blocks.adapted import Adapted, attach, merge, weights_of
from zoo.decoder import Decoder
from zoo.spec.base import ConfigError
from zoo.spec.finetune import LoraFinetune


def adapt(model: Decoder, lora: LoraFinetune) -> None:
    """Freeze a model and put adapters beside the weights that `lora.targets` names. Its outputs stay what they are.

    Raises:
        ConfigError: a pattern matches nothing that can be adapted, or the model has adapters already.
    """
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ConfigError("finetune: the model has adapters already; merge them first: zoo.adapt.lora.merge_adapters")
    places = dict(adaptable(model))
    chosen = matching(lora.targets, list(places), "finetune.targets", "matrices inside layers")
    model.requires_grad_(False)
    for name, (module, weight) in places.items():
        if name in chosen:
            attach(module, weight, lora.rank, lora.scale)


def adaptable(model: Decoder) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """The weights that adapters can stand beside, by name: the module that holds each, and its name there.

    An indexer is left out: the choice of keys has no gradient.
    """
    for prefix, module in model.named_modules():
        if "indexer" not in prefix.split("."):
            yield from ((f"{prefix}.{weight}", (module, weight)) for weight in weights_of(module))


def adapters_of(model: Decoder) -> dict[str, Tensor]:
    """The adapters of a model by name; they share its memory."""
    owned = ((prefix, module) for prefix, module in model.named_modules() if isinstance(module, Adapted))
    return {
        f"{prefix}.{name}": value.detach()
        for prefix, module in owned
        for name, value in module.named_parameters(recurse=False)
        if name.endswith(("lora_a", "lora_b"))
    }


def fill_adapters(model: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Copy the values of adapters into those of a model.

    Raises:
        ConfigError: they are of another model, or of other targets or ranks.
    """
    own = adapters_of(model)
    found = {name: list(value.shape) for name, value in tensors.items()}
    wanted = {name: list(value.shape) for name, value in own.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{name}: the adapters have {found.get(name, 'no such tensor')}, "
                f"the model asks for {wanted.get(name, 'none')}"
            )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def kept_of(model: Decoder) -> nn.Module:
    """What a checkpoint keeps of a model: its adapters alone if it has any, else all of it."""
    return Adapters(model) if any(isinstance(module, Adapted) for module in model.modules()) else model


class Adapters(nn.Module):
    """A model's adapters as all that there is of it to save and to load: the rest is as it came."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that it is no part of this module

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        del args, options
        return dict(adapters_of(self._model[0]))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        del args, options
        fill_adapters(self._model[0], state_dict)


def merge_adapters(model: Decoder) -> None:
    """Put the adapters into the weights: a plain model is left, trainable as a whole."""
    for module in list(model.modules()):
        if isinstance(module, Adapted):
            merge(module)
    model.requires_grad_(True)
    for moe in model.moe_layers().values():
        bias = moe.router.correction_bias
        if isinstance(bias, nn.Parameter):
            bias.requires_grad_(False)
