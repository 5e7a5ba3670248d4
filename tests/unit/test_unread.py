"""coordinator/unread.py: what waits for a client is bounded, and the client is told."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import RequestError
from cluster.types import SequenceId
from coordinator.events import TokenDrawn
from coordinator.unread import Unread


def drawn(token: int) -> TokenDrawn:
    return TokenDrawn(SequenceId(1), token)


def test_events_come_in_order() -> None:
    async def scenario() -> None:
        unread = Unread(pytest.fail, events_max=3)
        for round_ in range(5):  # what was read does not count
            for token in range(3):
                unread.put(drawn(10 * round_ + token))
            assert [await unread.get() for _ in range(3)] == [drawn(10 * round_ + token) for token in range(3)]

    asyncio.run(scenario())


def test_a_client_that_falls_too_far_behind_is_given_up_once() -> None:
    async def scenario() -> None:
        given_up = []
        unread = Unread(lambda: given_up.append(True), events_max=3)
        for token in range(3):
            unread.put(drawn(token))
        assert not given_up
        for token in range(3):
            unread.put(drawn(token))
        assert given_up == [True]
        with pytest.raises(RequestError, match="waiting to be read"):
            await unread.get()

    asyncio.run(scenario())
