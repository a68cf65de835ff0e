"""Conversations as documents: what a template makes of messages, of which the answers alone are learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from zoo.data.formats import Found, Markup, Part, json_type
from zoo.data.paths import what_is_there
from zoo.spec.base import ConfigError

Message = Mapping[str, Any]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BUILT_IN = {"chatml": CHATML}
TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"
_MAX_BYTES = 1 << 20
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Template:
    """A chat template as those of Hugging Face tokenizers: jinja2, run in its sandbox.

    Args:
        text: the template.
        tokens: special tokens that it may name: `bos_token`, `eos_token` ...

    Raises:
        ConfigError: it is no sound template.
    """

    def __init__(self, text: str, tokens: Mapping[str, str] | None = None) -> None:
        from jinja2 import TemplateSyntaxError

        self.text, self._tokens = text, dict(tokens or {})
        try:
            self._compiled = _environment().from_string(text)
        except TemplateSyntaxError as error:
            raise ConfigError(f"data.template: line {error.lineno}: {error.message}") from None

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """Messages as text; with `prompt`, up to where the next answer begins.

        Raises:
            ValueError: the template refuses them.
        """
        from jinja2 import TemplateError

        try:
            return self._compiled.render(messages=list(messages), add_generation_prompt=prompt, **self._tokens)
        except (TemplateError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
            raise ValueError(f"the template refuses it: {error}") from None

    def parts(self, messages: Sequence[Message]) -> tuple[Part, ...]:
        """A conversation in pieces, of which the answers are learned, each with what ends it.

        An answer lies between the conversation up to it, rendered as a prompt, and the conversation with it. Where a
        template shortens earlier turns, as some do with thoughts, those answers are read only.

        Raises:
            ValueError: the template refuses it, or no answer can be found in what it makes of it.
        """
        whole = self.render(messages)
        parts: list[Part] = []
        done = 0
        for start, end in self._answers(messages, whole):
            if start >= done:
                parts += [(_markup(whole[done:start]), False), (_markup(whole[start:end]), True)]
                done = end
        if not parts:
            raise ValueError("no answer can be told from what the template writes around it")
        return (*parts, (_markup(whole[done:]), False))

    def _answers(self, messages: Sequence[Message], whole: str) -> Iterator[tuple[int, int]]:
        """Where the answers are; white space after their last mark is not theirs."""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], prompt=True) if index else ""
            after = self.render(messages[: index + 1]) if index + 1 < len(messages) else whole
            if whole.startswith(after) and after.startswith(before):
                end = len(after.rstrip())
                if end > len(before):
                    yield len(before), end


def _markup(text: str) -> Markup:
    return Markup(text.encode("utf-8"))


@cache
def load_template(name: str) -> Template:
    """The template that a setting means: one of `BUILT_IN`, a file, or the directory of a tokenizer.

    Raises:
        ConfigError: there is none.
    """
    if name in BUILT_IN:
        return Template(BUILT_IN[name])
    path = Path(name).expanduser()
    if path.is_dir():
        settings = _settings(path / SETTINGS_FILE) if (path / SETTINGS_FILE).is_file() else {}
        if (path / TEMPLATE_FILE).is_file():
            return Template(_text(path / TEMPLATE_FILE), _special(settings))
        return _of_settings(settings, path)
    if not path.is_file():
        known = " or ".join(BUILT_IN)
        raise ConfigError(f"data.template: found {name!r}; allowed: {known}, or a file; {what_is_there(path)}")
    if path.suffix == ".json":
        return _of_settings(_settings(path), path)
    return Template(_text(path))


def _of_settings(settings: Mapping[str, Any], path: Path) -> Template:
    """The template in a tokenizer_config.json, which may hold several by name."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, Mapping)}
        found = named.get("default")
    if not isinstance(found, str):
        raise ConfigError(f"data.template: found '{path}'; it holds no chat template; data.template=chatml is built in")
    return Template(found, _special(settings))


def _special(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {name: settings.get(name) for name in _TOKENS}
    texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in found.items()}
    return {name: value for name, value in texts.items() if isinstance(value, str)}


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"data.template: found '{path}'; not JSON: {error}") from None
    return settings if isinstance(settings, Mapping) else {}


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"data.template: found '{path}'; larger than {_MAX_BYTES >> 20} MiB; not read")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.template: found '{path}'; cannot be read: {error}") from None


def conversation(row: Any, key: str, template: Template) -> Found:
    """The document of a row {key: [{"role": ..., "content": ...}, ...]}, or why there is none."""
    if not isinstance(row, Mapping):
        return f"an object with the key {key!r} is needed, not {json_type(row)}"
    if key not in row:
        return f"no key {key!r}; keys: {', '.join(list(row)[:8]) or 'none'}; set data.text_key"
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        return f"{key!r} must be a list of messages, not {json_type(messages)}"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            return f"message {number} must be an object with role and content, not {json_type(message)}"
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f"message {number}: {name!r} must be a string, not {json_type(message.get(name))}"
    if all(message["role"] != "assistant" for message in messages):
        return "no message of the role assistant: there is nothing to learn"
    try:
        return template.parts(messages)
    except UnicodeEncodeError as error:  # half of a surrogate pair
        return f"not text: {error}"
    except ValueError as error:
        return str(error)


@cache
def _environment() -> Any:
    """jinja2 with what templates of Hugging Face count on; nothing that they name can reach Python."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers for others; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    return made


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
