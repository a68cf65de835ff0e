"""Models that also see and hear: the text model inside their configs and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zoo.hf.keys import IGNORED, refused
from zoo.spec.base import ConfigError

TEXT = "text_config"
# Of the parts beside the text model, and of the tokens that stand for what they have seen and heard.
_BESIDE = re.compile(
    r"\w+_config|\w+_token_(id|index)|\w+_tokens_per_image|(vision|image|video|audio|multimodal|projector|spatial)_\w+"
)
LAYOUTS = (
    {"model.": "model.language_model."},
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
)
"""How names of the text model begin: in the memory of transformers 5, and as older checkpoints have them."""
OTHER_WEIGHTS = (
    r".*rotary_emb\.inv_freq",
    r"(?:model\.)?(?:visual|vision_\w+|audio_tower|embed_vision|embed_audio|multi_modal_projector|vit_\w+)\..*",
)
"""Patterns of tensors of the parts beside the text model."""


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: what `text_config` holds, or the whole where there is no such object.

    Raises:
        ConfigError: beside it stands what is not known to be of other parts.
    """
    text = config.get(TEXT)
    if not isinstance(text, Mapping):
        return config
    outside = {"model_type", "tie_word_embeddings", "initializer_range", "quantization_config", *IGNORED}
    if unknown := [name for name in config if name not in outside and not _BESIDE.fullmatch(name)]:
        raise ConfigError(f"config.json: not understood beside {TEXT}: {', '.join(unknown)}")
    name = config.get("model_type")
    if not isinstance(name, str):
        raise refused("model_type", name, "must be a name")
    inherited = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
    return {"model_type": f"{name}_text", **inherited, **text}
