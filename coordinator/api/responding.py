"""Answers a job: all at once, or event by event. What an answer looks like is the Shape's business."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive

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
    """Generate and answer. Errors before the first token are raised; they still get a status of their own."""
    deltas = generate(generator, job)
    if not job.options.stream:
        return await until_gone(receive, _whole(deltas, job, shape))
    first = await until_gone(receive, _first(deltas))
    return EventStream(_events(first, deltas, job, shape))


async def _first(deltas: AsyncGenerator[Delta, None]) -> Delta:
    return await anext(deltas)


async def _whole(deltas: AsyncGenerator[Delta, None], job: Job, shape: Shape) -> Response:
    choices = [Whole() for _ in range(job.choice_count)]
    async with aclosing(deltas):
        async for delta in deltas:
            choices[delta.choice].add(delta)
    count = sum(len(choice.tokens) for choice in choices)
    body = {**shape.whole(job, choices), "usage": usage(job, count)}
    return Response(json.dumps(body, ensure_ascii=False).encode(), media_type="application/json")


async def _events(
    first: Delta, deltas: AsyncGenerator[Delta, None], job: Job, shape: Shape
) -> AsyncGenerator[bytes, None]:
    """The stream's events. An error in the middle is an event of its own, without [DONE] after it: the official client
    raises it, and nobody can take the answer for a whole one."""
    count = 0
    # OpenAI sends a null usage with every chunk but the last when the client asked for it.
    pending: Object = {"usage": None} if job.options.include_usage else {}
    chunks = ChunkWriter(job, shape, pending)
    try:
        async with aclosing(deltas):
            for chunk in shape.opening(job):
                yield sse({**chunk, **pending})
            yield chunks.write(first)
            count += len(first.tokens)
            async for delta in deltas:
                count += len(delta.tokens)
                yield chunks.write(delta)
        if job.options.include_usage:
            yield sse({**shape.closing(job), "usage": usage(job, count)})
        yield DONE
    except Exception as error:  # noqa: BLE001 - the boundary of a request: the status is out, so the stream says it.
        yield b"data: " + problem_of(error).body() + b"\n\n"


def usage(job: Job, completion_tokens: int) -> Object:
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": job.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
