"""Reading a Hugging Face config.json so that no key is passed over in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zoo.spec.base import ConfigError

# Keys that change nothing about the computation of logits: bookkeeping, special tokens, and what generation and
# classification heads read. Dropouts are not here: they are understood at 0 only.
IGNORED = frozenset(
    """
    _name_or_path _model_name_or_path architectures auto_map model_type torch_dtype dtype transformers_version
    transformers.js_config use_cache tokenizer_class
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id prefix
    output_attentions output_hidden_states output_router_logits output_scores return_dict return_dict_in_generate
    keys_to_ignore_at_inference attn_implementation _attn_implementation experts_implementation
    _experts_implementation torchscript use_bfloat16 tf_legacy_loss pruned_heads chunk_size_feed_forward pretraining_tp
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
ABSENT: Any = object()
"""Stands for a default that is not given."""


class Keys:
    """The keys of a config; each is taken by the row of the family's table that understands it."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """
        Args:
            config: as in config.json.
            defaults: what the family's class in transformers takes for a key that is absent.
        """
        self.config = config
        self._defaults = defaults
        self.taken: set[str] = set()

    def take(self, name: str, default: Any = ABSENT) -> Any:
        """The value of a key; `default` beats the family's default.

        Raises:
            ConfigError: the key is absent and has no default.
        """
        self.taken.add(name)
        if name in self.config:
            return self.config[name]
        if default is ABSENT:
            default = self._defaults.get(name, ABSENT)
        if default is ABSENT:
            raise ConfigError(f"config.json: {name} is missing; give it a value")
        return default

    def default(self, name: str) -> Any:
        """What the family's class takes for a key that is absent; None where the key has no default."""
        return self._defaults.get(name)

    def take_first(self, names: Iterable[str]) -> Any:
        """The value of a key that has several spellings; all that are present must agree."""
        names = list(names)
        present = [name for name in names if name in self.config]
        values = [self.take(name) for name in present]
        for name, value in zip(present, values, strict=True):
            if value != values[0]:
                raise ConfigError(f"config.json: {present[0]} is {values[0]!r} and {name} is {value!r}; remove one")
        return values[0] if values else self.take(next((name for name in names if name in self._defaults), names[0]))

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise refused(name, value, f"must be a whole number from {low} to {high}")
        return value

    def untaken(self) -> list[str]:
        """Keys that no row has taken and that are not known to be without effect."""
        return [name for name in self.config if name not in self.taken and name not in IGNORED]


def refused(name: str, found: Any, rule: str) -> ConfigError:
    """The error for a value of a config key."""
    return ConfigError(f"config.json: {name}: found {found!r}; {rule}")
