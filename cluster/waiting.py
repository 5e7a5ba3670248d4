"""Deadlines on streams: no wait in this project is without a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from typing import TypeVar

_T = TypeVar("_T")


async def each_within(stream: AsyncIterable[_T], silence_max_s: float) -> AsyncIterator[_T]:
    """The items of `stream`; TimeoutError when the next one takes longer than `silence_max_s`."""
    iterator = aiter(stream)
    while True:
        try:
            item = await asyncio.wait_for(anext(iterator), silence_max_s)
        except StopAsyncIteration:
            return
        yield item
