"""Clients that leave: whatever they asked for is cancelled, at every stage of a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
from starlette.types import Message

from coordinator.api.app import create_app
from coordinator.api.streaming import EventStream
from tests.fake_generator import FakeGenerator

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


async def call(
    generator: FakeGenerator,
    receive: Callable[[], Awaitable[Message]],
    path: str,
    on_send: Callable[[Message], None] = lambda message: None,
) -> list[Message]:
    """One request through the ASGI interface, so that a test decides when the client goes."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)
        on_send(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": path, "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"",
        "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    await asyncio.wait_for(create_app(generator)(scope, receive, send), 10)
    return sent


def cancelled(generator: FakeGenerator) -> bool:
    """Asked while the loop runs: closing the loop ends abandoned generators by itself."""
    return generator.finished == [request.id for request in generator.requests] != []


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_cancels(stream: bool) -> None:
    async def scenario() -> bool:
        generator = FakeGenerator()
        generator.stuck_after = 0
        first = [body({"prompt": "x", "stream": stream})]

        async def receive() -> Message:
            if first:
                return first.pop()
            await generator.begun.wait()
            return {"type": "http.disconnect"}

        await call(generator, receive, COMPLETIONS)
        return cancelled(generator)

    assert asyncio.run(scenario())


def test_a_client_that_stays_and_reads_nothing_is_given_up() -> None:
    """A send that does not return is a full connection. One that takes its time is none."""

    async def scenario() -> tuple[int, bool]:
        sent, closed = 0, False

        async def events() -> AsyncGenerator[bytes, None]:
            nonlocal closed
            try:
                while True:
                    yield b"data: x\n\n"
            finally:
                closed = True

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal sent
            sent += 1
            await (asyncio.sleep(0.01) if sent < 20 else asyncio.Event().wait())

        await asyncio.wait_for(EventStream(events(), patience_s=0.05)({}, receive, send), 10)
        return sent, closed

    assert asyncio.run(scenario()) == (20, True)


def test_a_client_that_leaves_in_the_middle_of_a_stream_cancels() -> None:
    async def scenario() -> tuple[bool, list[Message]]:
        generator, gone = FakeGenerator(), asyncio.Event()
        generator.stuck_after = 2
        first = [body({"prompt": "x", "stream": True})]

        async def receive() -> Message:
            if first:
                return first.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        def on_send(message: Message) -> None:
            if message["type"] == "http.response.body":
                gone.set()

        sent = await call(generator, receive, COMPLETIONS, on_send)
        return cancelled(generator), sent

    all_cancelled, sent = asyncio.run(scenario())
    assert all_cancelled
    assert sent[-1].get("more_body") is True  # the response never ended


def test_a_connection_that_fails_while_it_is_written_to_cancels() -> None:
    async def scenario() -> bool:
        generator, first = FakeGenerator(), [body({"prompt": "x", "stream": True})]

        async def receive() -> Message:
            if first:
                return first.pop()
            await asyncio.Event().wait()
            raise AssertionError

        def on_send(message: Message) -> None:
            if message["type"] == "http.response.body":
                raise BrokenPipeError

        await call(generator, receive, COMPLETIONS, on_send)
        return cancelled(generator)

    assert asyncio.run(scenario())


def body(value: object) -> Message:
    return {"type": "http.request", "body": json.dumps(value).encode(), "more_body": False}


def test_a_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.api.reading.HTTP_BODY_TIMEOUT_S", 0.0)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    sent = asyncio.run(call(FakeGenerator(), receive, CHAT))
    assert sent[0]["status"] == 408
