"""Answers a job: all at once, or event by event. What an answer looks like is the Shape's business."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive

from cluster.limits import SILENCE_MAX_S
from coordinator.api.answer import Delta, Job, generate
from coordinator.api.chunks import ChunkShape, ChunkWriter
from coordinator.api.errors import problem_of
from coordinator.api.streaming import DONE, EventStream, Object, sse, until_gone
from coordinator.generation import Generator
from coordinator.sequence import EndReason


@dataclass(slots=True)
class Whole:
    """A choice of an answer that is not streamed."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end: EndReason | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.tokens.extend(delta.tokens)
        self.end = delta.end


class Count:
    """The tokens that an answer cost."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}  # by choice, of those that have a token

    def add(self, delta: Delta) -> None:
        self._completion_tokens += len(delta.tokens)
        if delta.tokens:
            self._cached.setdefault(delta.choice, delta.cached_tokens)

    def usage(self) -> Object:
        """A prompt counts once, however many choices it has; so of what its choices found cached, only what none of
        them had to compute."""
        job, n = self._job, self._job.request.n
        prompts = [range(at * n, (at + 1) * n) for at in range(len(job.request.prompts))]
        cached = sum(min(self._cached.get(choice, 0) for choice in choices) for choices in prompts)
        return {
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": job.prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Shape(ChunkShape, Protocol):
    """How one of the two APIs writes answers."""

    def whole(self, job: Job, choices: list[Whole]) -> Object:
        """The body without usage."""
        ...

    def opening(self, job: Job) -> Iterator[Object]:
        """Chunks before the first token."""
        ...

    def closing(self, job: Job) -> Object:
        """The chunk without choices that carries the usage."""
        ...


async def respond(generator: Generator, job: Job, shape: Shape, receive: Receive) -> Response:
    """Generate and answer. Errors before the first token are raised; they still get a status of their own. A stream
    whose first token takes long begins without it, so that nobody takes it for dead."""
    deltas = generate(generator, job)
    if not job.options.stream:
        return await until_gone(receive, _whole(deltas, job, shape))
    first = asyncio.create_task(_first(deltas))
    await until_gone(receive, _a_while(first))
    if first.done():
        first.result()
    events = _events(first, deltas, job, shape)
    return EventStream(events, silence_max_s=SILENCE_MAX_S, why=lambda: generator.reason)


async def _first(deltas: AsyncGenerator[Delta, None]) -> Delta:
    return await anext(deltas)


async def _a_while(first: asyncio.Task[Delta]) -> None:
    try:
        await asyncio.wait({first}, timeout=SILENCE_MAX_S)
    except asyncio.CancelledError:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        raise


async def _whole(deltas: AsyncGenerator[Delta, None], job: Job, shape: Shape) -> Response:
    choices = [Whole() for _ in range(job.choice_count)]
    count = Count(job)
    async with aclosing(deltas):
        async for delta in deltas:
            choices[delta.choice].add(delta)
            count.add(delta)
    body = {**shape.whole(job, choices), "usage": count.usage()}
    return Response(json.dumps(body, ensure_ascii=False).encode(), media_type="application/json")


async def _events(
    first: asyncio.Task[Delta], deltas: AsyncGenerator[Delta, None], job: Job, shape: Shape
) -> AsyncGenerator[bytes, None]:
    """The stream's events. An error in the middle is an event of its own, without [DONE] after it: the official client
    raises it, and nobody can take the answer for a whole one."""
    count = Count(job)
    # OpenAI sends a null usage with every chunk but the last when the client asked for it.
    pending: Object = {"usage": None} if job.options.include_usage else {}
    chunks = ChunkWriter(job, shape, pending)
    try:
        async with aclosing(deltas):
            for chunk in shape.opening(job):
                yield sse({**chunk, **pending})
            delta = await first
            count.add(delta)
            yield chunks.write(delta)
            async for delta in deltas:
                count.add(delta)
                yield chunks.write(delta)
        if job.options.include_usage:
            yield sse({**shape.closing(job), "usage": count.usage()})
        yield DONE
    except Exception as error:  # noqa: BLE001 - the boundary of a request: the status is out, so the stream says it.
        yield b"data: " + problem_of(error).body() + b"\n\n"
