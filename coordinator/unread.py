"""What a request's client has not read yet. A client that stops reading holds up nobody else: the pipeline goes on,
and what it makes waits here, up to a limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.errors import RequestError
from cluster.limits import UNREAD_TOKENS_MAX
from coordinator.events import Event


class Unread:
    """A request's events in order. Beyond the limit all are forgotten and `give_up` is called, once."""

    def __init__(self, give_up: Callable[[], None], events_max: int = UNREAD_TOKENS_MAX) -> None:
        self._give_up = give_up
        self._max = events_max
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._given_up = False

    def put(self, event: Event) -> None:
        if self._given_up:
            return
        if self._events.qsize() < self._max:
            self._events.put_nowait(event)
            return
        self._given_up = True
        self._events = asyncio.Queue()
        self._give_up()

    async def get(self) -> Event:
        """The next event. RequestError when there were too many: nobody is waiting here then."""
        if self._given_up:
            raise RequestError(
                f"the answer was given up: {self._max} tokens of it were waiting to be read", code="unread"
            )
        return await self._events.get()
