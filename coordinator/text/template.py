"""Renders a chat as the text that the model was trained on, with the model's own Jinja template.

Templates come with models from anywhere, so they run in Jinja's immutable sandbox and see plain values only. Options
and globals are those that transformers renders with: the same template gives the same text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from cluster.errors import ModelError, RequestError

ChatMessage = Mapping[str, str]
"""role, content, and name where the client gave one."""


class ChatTemplate:
    """A compiled template. `special_tokens` are the names that templates use, such as bos_token."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, now: Callable[[], datetime] = datetime.now
    ) -> None:
        environment = _environment(now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template is not valid Jinja: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The chat as text, up to where the assistant's answer begins."""
        try:
            return self._template.render(
                messages=[self._plain(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:  # raise_exception's among them: the template's own words
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        except Exception as error:  # a template is foreign code: it may raise whatever Python can
            reason = f"the model's chat template fails on these messages ({type(error).__name__})"
            raise RequestError(reason, field="messages") from error

    def _plain(self, message: ChatMessage) -> dict[str, str]:
        """A copy for the template. `developer` is OpenAI's newer name for `system`; most templates know only that one,
        and would drop the message in silence."""
        plain = dict(message)
        if plain["role"] == "developer" and not self._knows_developer:
            plain["role"] = "system"
        return plain


def _environment(now: Callable[[], datetime]) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    environment.globals["dict"] = lambda *pairs, **named: dict(*pairs, **named)
    environment.globals["namespace"] = _Namespace
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration is mutable.

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore: those could shadow Python's own."""

    def __init__(*args: Any, **named: Any) -> None:  # self is in args, so that namespace(self=...) works
        attributes = dict(*args[1:], **named)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_private(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _refuse_private(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model expects."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
