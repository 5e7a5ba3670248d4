"""One streamed answer from any OpenAI endpoint, with the moment at which each piece of it came.

Owns: the connection and the reading of server-sent events, cheap enough for hundreds of streams in one event loop.
Every request has a connection of its own, as separate users have. Knows nothing of what is measured with it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from urllib.parse import SplitResult

import h11

from cluster.errors import ClusterError, PotluckError, RequestError

_READ_BYTES = 1 << 16
_EVENT_BYTES_MAX = 1 << 20  # an endpoint that never ends a line is broken


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, in seconds of the monotonic clock."""

    began_s: float
    pieces_s: tuple[float, ...]  # one moment for each event that brought text
    ended_s: float
    prompt_tokens: int  # as the endpoint counts; 0 when it does not say
    cached_tokens: int
    tokens: int  # as the endpoint counts, else the pieces
    text: str = ""
    problem: str = ""  # why there is no whole answer

    @property
    def first_s(self) -> float | None:
        """The time to the first token."""
        return self.pieces_s[0] - self.began_s if self.pieces_s else None

    @property
    def gaps_s(self) -> tuple[float, ...]:
        return tuple(after - before for before, after in zip(self.pieces_s, self.pieces_s[1:], strict=False))

    @property
    def tokens_s(self) -> float | None:
        """Tokens a second as this user sees them, once they come."""
        if len(self.pieces_s) < 2 or self.pieces_s[-1] <= self.pieces_s[0]:
            return None
        return (self.tokens - 1) / (self.pieces_s[-1] - self.pieces_s[0])


@dataclass(frozen=True, slots=True)
class Target:
    """An endpoint, and how it is asked."""

    name: str
    url: SplitResult  # without /v1
    model: str
    key: str | None


async def ask(target: Target, body: Mapping[str, object], timeout_s: float) -> Answer:
    """Stream one chat answer to its end. What goes wrong is part of the answer: a benchmark counts it."""
    body = {**body, "model": target.model, "stream": True, "stream_options": {"include_usage": True}}
    began_s = time.monotonic()
    pieces: list[float] = []
    texts: list[str] = []
    usage: Mapping[str, object] = {}
    problem = ""
    try:
        async with asyncio.timeout(timeout_s), aclosing(_events(target, json.dumps(body).encode())) as events:
            async for came_s, event in events:
                if "error" in event:
                    raise ClusterError(_message(event))
                if (text := _text(event)) is not None:
                    pieces.append(came_s)
                    texts.append(text)
                told = event.get("usage")
                usage = told if isinstance(told, dict) else usage
    except (PotluckError, OSError, h11.ProtocolError) as error:
        problem = str(error) or type(error).__name__
    except TimeoutError:
        problem = f"no end after {timeout_s:.0f} s"
    tokens = _count(usage, "completion_tokens") or len(pieces)
    if not problem and not tokens:
        problem = "the answer holds no tokens"
    details = usage.get("prompt_tokens_details")
    return Answer(
        began_s=began_s,
        pieces_s=tuple(pieces),
        ended_s=time.monotonic(),
        prompt_tokens=_count(usage, "prompt_tokens"),
        cached_tokens=_count(details, "cached_tokens") if isinstance(details, dict) else 0,
        tokens=tokens,
        text="".join(texts),
        problem=problem,
    )


async def _events(target: Target, body: bytes) -> AsyncGenerator[tuple[float, Mapping[str, object]], None]:
    """The answer's events, each with the moment at which its bytes had come."""
    url = target.url
    secure = ssl.create_default_context() if url.scheme == "https" else None
    reader, writer = await asyncio.open_connection(url.hostname, url.port or (443 if secure else 80), ssl=secure)
    try:
        http = h11.Connection(h11.CLIENT)
        headers = [("Host", url.netloc), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        headers += [("Authorization", f"Bearer {target.key}")] if target.key else []
        request = h11.Request(method="POST", target=f"{url.path}/v1/chat/completions", headers=headers)
        for part in (request, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(http.send(part) or b"")
        await writer.drain()
        status, pending = 200, b""
        while True:
            event = http.next_event()
            match event:
                case h11.NEED_DATA:
                    http.receive_data(await reader.read(_READ_BYTES))
                case h11.Response():
                    status = event.status_code
                case h11.Data():
                    came_s = time.monotonic()
                    pending += bytes(event.data)
                    if status == 200:
                        *lines, pending = pending.split(b"\n")
                        for line in lines:
                            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                                yield came_s, _object(data)
                    if len(pending) > _EVENT_BYTES_MAX:
                        raise ClusterError(f"{target.name} sent a line of over {_EVENT_BYTES_MAX} bytes")
                case h11.EndOfMessage():
                    if status != 200:
                        raise RequestError(f"HTTP {status}: {_refusal(pending)}")
                    return
                case _:
                    raise ClusterError(f"{target.name} closed the connection within an answer")
    finally:
        writer.close()


def _object(line: bytes) -> Mapping[str, object]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ClusterError(f"expected a JSON object, found {line[:80]!r}")
    return value


def _refusal(body: bytes) -> str:
    """In the endpoint's words, or the beginning of a page that a proxy put in their place."""
    try:
        return _message(_object(body))
    except ClusterError:
        return repr(body[:80])


def _message(event: Mapping[str, object]) -> str:
    error = event.get("error", event)
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _text(event: Mapping[str, object]) -> str | None:
    """The answer's new text; empty where a model thinks aloud, which is a sign of life like any other."""
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    delta = choices[0].get("delta")
    if not isinstance(delta, dict) or not (delta.get("content") or delta.get("reasoning_content")):
        return None
    return str(delta.get("content") or "")


def _count(usage: Mapping[str, object], name: str) -> int:
    value = usage.get(name)
    return value if type(value) is int and value >= 0 else 0
