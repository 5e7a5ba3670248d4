"""Reads the messages of a chat. Text only: other kinds of content, and tools, are refused by name."""

from __future__ import annotations

from typing import Final

from cluster.errors import RequestError
from coordinator.api.fields import Fields, checked_text, shown
from coordinator.text.template import ChatMessage

_ROLES: Final = ("system", "developer", "user", "assistant")


def read_messages(fields: Fields) -> tuple[ChatMessage, ...]:
    """Every message with its role and its content as one string."""
    items = fields.objects("messages")
    if not items:
        raise RequestError("messages must be a list of at least one message", field="messages", code="invalid_value")
    return tuple(_read_message(Fields(item, f"messages[{at}]")) for at, item in enumerate(items))


def _read_message(fields: Fields) -> ChatMessage:
    role = fields.text("role")
    if role is None or role not in _ROLES:
        fields.fail("role", "one of " + ", ".join(_ROLES) + " (tools are not supported)", role)
    message = {"role": role, "content": _read_content(fields)}
    name = fields.text("name")
    if name is not None:
        message["name"] = name
    fields.neutral({"tool_calls": ([],), "annotations": ([],)})  # what clients echo from an earlier answer
    fields.finish()
    return message


def _read_content(fields: Fields) -> str:
    """A string, or parts of type text, which are joined by line breaks."""
    value = fields.take("content")
    if not isinstance(value, (str, list)):
        fields.fail("content", "a string or a list of content parts", value)
    if isinstance(value, str):
        return checked_text(value, fields.name("content"))
    return "\n".join(_read_part(Fields(part, fields.name(f"content[{at}]"))) for at, part in enumerate(value))


def _read_part(fields: Fields) -> str:
    kind = fields.text("type")
    if kind != "text":
        name = fields.name("type")
        raise RequestError(f"{name} must be text, the only kind of content here, found {shown(kind)}", field=name)
    text = fields.text("text")
    if text is None:
        fields.fail("text", "a string", text)
    fields.finish()
    return text
