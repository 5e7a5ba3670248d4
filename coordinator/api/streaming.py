"""Server-sent events, and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.limits import SILENCE_MAX_S, UNREAD_TIMEOUT_S
from coordinator.api.errors import ClientGone

_T = TypeVar("_T")

Object = Mapping[str, object]

DONE: Final = b"data: [DONE]\n\n"

_write_json: Final = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":")
).encode  # json.dumps makes one each time


def sse(value: Object) -> bytes:
    """One event."""
    return b"data: " + _write_json(value).encode() + b"\n\n"


def json_text(text: str) -> bytes:
    """The text as it stands in an event."""
    return _write_json(text).encode()


def comment(text: str) -> bytes:
    """What clients skip, and people see who look at the stream."""
    return b": " + " ".join(text.split()).encode() + b"\n\n"


async def until_gone(
    receive: Receive, work: Coroutine[Any, Any, _T], given_up: Coroutine[Any, Any, None] | None = None
) -> _T:
    """Do the work unless the client closes the connection or is given up: then the work is cancelled and ClientGone
    raised."""
    task = asyncio.create_task(work)
    watches = [asyncio.create_task(watch) for watch in (_gone(receive), given_up) if watch is not None]
    try:
        await asyncio.wait({task, *watches}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, *watches):
            one.cancel()
        await asyncio.gather(task, *watches, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed the connection; the body has been read by now."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come, and in long silences comments that say why. The generator is closed in every case,
    which cancels what nobody reads."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        patience_s: float = UNREAD_TIMEOUT_S,
        silence_max_s: float = SILENCE_MAX_S,
        why: Callable[[], str] = lambda: "",
    ) -> None:
        # Proxies that buffer or re-encode would hold tokens back.
        super().__init__(headers={"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._patience_s = patience_s
        self._silence_max_s = silence_max_s
        self._why = why
        self._sent = 0
        self._is_sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send(send), self._until_stuck())
        except (ClientGone, OSError):  # some servers notice a closed connection only when they write to it
            pass
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        commenting = asyncio.create_task(self._comment(send))
        try:
            async for event in self._events:
                self._is_sending = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._is_sending = False
                self._sent += 1
        finally:
            commenting.cancel()
            await asyncio.gather(commenting, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _comment(self, send: Send) -> None:
        """Where no event was sent between two looks."""
        while True:
            sent = self._sent
            await asyncio.sleep(self._silence_max_s)
            if self._sent == sent and not self._is_sending:
                await send({"type": "http.response.body", "body": comment(self._why() or "working"), "more_body": True})

    async def _until_stuck(self) -> None:
        """Returns when the client has read nothing for some time: the same event has waited to be sent at two looks."""
        sent = -1
        while not (self._is_sending and self._sent == sent):
            sent = self._sent if self._is_sending else -1
            await asyncio.sleep(self._patience_s)
