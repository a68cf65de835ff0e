"""Public calls that build on several floors. Torch is imported when one of them is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.config import load
from zoo.spec.model import ModelSpec

if TYPE_CHECKING:
    import torch

    from zoo.decoder import Decoder


def build(
    model: ModelSpec | str,
    *overrides: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Decoder:
    """A model with random initial weights.

    Args:
        model: A description, or the name of one (`zoo.list_models()`).
        overrides: Changes to the named model, as on the command line: `"model.moe.num_experts=64"`.
        device: Where its weights live; `"meta"` for shapes alone.
        dtype: Of its weights; None: torch's default.

    Returns:
        A module that maps tokens [batch, seq] int64 to logits [batch, seq, vocab].

    Raises:
        ConfigError: no such model, or overrides that do not fit it.
    """
    from zoo.decoder import build as build_decoder

    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if isinstance(model, str):
        return build_decoder(load(model, *overrides), **options)
    if overrides:
        raise TypeError(f"overrides change a named model; change a description with .replace(...), found {overrides}")
    return build_decoder(model, **options)
