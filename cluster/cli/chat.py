"""`potluck chat`: a conversation with the model behind an endpoint."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass

from cluster.cli.endpoint import Endpoint, delta_text
from cluster.errors import PotluckError

_HINT = "Ask something. Ctrl-C stops an answer; an empty line or Ctrl-D ends the conversation."


@dataclass(frozen=True, slots=True)
class ChatCommand:
    """The options as typed."""

    prompt: str | None
    url: str
    system: str | None
    temperature: float | None
    max_tokens: int | None


class _Stopped(Exception):
    """Ctrl-C in the middle of an answer; closing the stream frees it on every node."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


def chat_command(command: ChatCommand) -> int:
    endpoint = Endpoint(command.url)
    model = endpoint.chat_model()
    messages = [{"role": "system", "content": command.system}] if command.system else []
    if command.prompt is not None:
        messages.append({"role": "user", "content": command.prompt})
        _answer(endpoint, model, messages, command)
        return 0
    if sys.stdin.isatty():
        print(f"{model} at {endpoint.url}. {_HINT}")  # noqa: T201 - a conversation is this command's output
    while question := _ask():
        messages.append({"role": "user", "content": question})
        try:
            messages.append({"role": "assistant", "content": _answer(endpoint, model, messages, command)})
        except PotluckError as error:
            print(f"\n! {error}", file=sys.stderr)  # noqa: T201
            messages.pop()
        except _Stopped as stopped:
            messages.append({"role": "assistant", "content": stopped.said})
    return 0


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _answer(endpoint: Endpoint, model: str, messages: list[dict[str, str]], command: ChatCommand) -> str:
    """Stream the answer to standard output; returns it whole."""
    body: dict[str, object] = {"model": model, "messages": messages}
    if command.temperature is not None:
        body["temperature"] = command.temperature
    if command.max_tokens is not None:
        body["max_tokens"] = command.max_tokens
    pieces = []
    try:
        with contextlib.closing(endpoint.stream("/v1/chat/completions", body)) as events:
            for event in events:
                text = delta_text(event)
                pieces.append(text)
                sys.stdout.write(text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        if command.prompt is not None:
            raise
        sys.stdout.write(" ...\n")
        raise _Stopped("".join(pieces)) from None
    sys.stdout.write("\n")
    return "".join(pieces)
