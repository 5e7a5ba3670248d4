"""Server-sent events, and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, Final, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

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


async def until_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Do the work unless the client closes the connection: then the work is cancelled and ClientGone raised."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed the connection; the body has been read by now."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come. The generator is closed in every case, which cancels what nobody reads."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        # Proxies that buffer or re-encode would hold tokens back.
        super().__init__(headers={"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send(send))
        except (ClientGone, OSError):  # some servers notice a closed connection only when they write to it
            pass
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
