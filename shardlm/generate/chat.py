"""A chat as one text, by the template that comes with a tokenizer.

Templates are programs in Jinja (https://huggingface.co/docs/transformers/chat_templating). They come with a model's
files and so from strangers: they run in Jinja's sandbox, and see nothing but messages and the text of special tokens.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from shardlm._extras import install

_OPEN = "CONTINUE_FINAL_MESSAGE_TAG "


def chat_template(tokenizer: Any, name: str | None = None) -> str:
    """The template of a tokenizer, or of several the one of a name.

    Raises:
        ValueError: it has none, or none of that name.
    """
    settings = getattr(tokenizer, "settings", None) or {}
    found = getattr(tokenizer, "chat_template", None) or settings.get("chat_template")
    if isinstance(found, Sequence) and not isinstance(found, str):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, Mapping):
        if (name or "default") not in found:
            raise ValueError(
                f"the tokenizer has no chat template {name or 'default'!r}, but {', '.join(sorted(found))}"
            )
        found = found[name or "default"]
    if not found:
        raise ValueError("the tokenizer has no chat template: it is of no chat model")
    return found


def apply_template(
    template: str,
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    prompt: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """A chat as one text.

    A template that takes no system message gets the chat without it, as in the lm-evaluation-harness.

    Args:
        template: as of `chat_template`.
        tokenizer: names the special tokens.
        messages: of "role" and "content" each.
        prompt: end with the beginning of the next answer; otherwise the last message stays open, to be continued.
        settings: variables of the template.

    Raises:
        ImportError: jinja2 is not installed.
        ValueError: the template takes no such chat.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(f"to apply a chat template: {install('eval')}") from error
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    variables: dict[str, Any] = {name: text for name in names if (text := _token(tokenizer, name))}
    variables |= dict(settings or {})
    try:
        compiled = _compiled(template)
        return _rendered(compiled, messages, prompt, variables)
    except jinja2.exceptions.TemplateError as error:
        rest = [message for message in messages if message["role"] != "system"]
        if len(rest) == len(messages) or isinstance(error, jinja2.exceptions.TemplateSyntaxError):
            raise ValueError(f"the chat template takes no such chat: {error}") from error
        return _rendered(compiled, rest, prompt, variables)


def _rendered(template: Any, messages: Sequence[Mapping[str, str]], prompt: bool, settings: Mapping[str, Any]) -> str:
    chat = [dict(message) for message in messages]
    if prompt:
        return template.render(messages=chat, tools=None, documents=None, add_generation_prompt=True, **settings)
    last = chat[-1]["content"]
    chat[-1]["content"] = last + _OPEN
    text = template.render(messages=chat, tools=None, documents=None, add_generation_prompt=False, **settings)
    at = text.rfind(_OPEN.strip())
    if at < 0:
        raise ValueError("the chat template leaves out the last message, so it cannot be continued")
    # A template that strips messages strips the mark's space: then the text ends as the message does without spaces.
    return text[:at] if text[at : at + len(_OPEN)] == _OPEN else text[:at].rstrip()


def _compiled(template: str) -> Any:
    import jinja2.exceptions
    import jinja2.ext
    import jinja2.sandbox

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    class Generation(jinja2.ext.Extension):
        """Marks what a model said; nothing here asks for it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            """The statements between, as they are."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _token(tokenizer: Any, name: str) -> str | None:
    value = getattr(tokenizer, name, None) or (getattr(tokenizer, "settings", None) or {}).get(name)
    return value.get("content") if isinstance(value, Mapping) else value
