"""The greeting that opens every data stream: both sides name the same epoch, stage and role, or hang up."""

from __future__ import annotations

import asyncio

from cluster.codec import Decoder, Expectation, encode
from cluster.errors import NodeLost, WireError
from cluster.frames import Hello
from cluster.limits import CONTROL_TIMEOUT_S
from cluster.plan import Fence
from cluster.transport import ByteStream


async def greet(stream: ByteStream, hello: Hello) -> None:
    """Say hello on a stream that this side opened. NodeLost when the other side is not there or elsewhere."""
    try:
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            await _write(stream, hello)
            answer = await stream.read()
    except TimeoutError as error:
        raise NodeLost(f"stage {hello.stage} did not answer within {CONTROL_TIMEOUT_S:.0f} s") from error
    if answer is None:
        raise NodeLost(f"stage {hello.stage} hung up: it is not in epoch {hello.fence.epoch}")
    if Decoder(Expectation(hello.fence, (), 0)).feed(answer) != hello:
        raise WireError(f"stage {hello.stage} answered with another greeting")


async def answer_greeting(stream: ByteStream, fence: Fence, stage: int) -> Hello:
    """Check the first message of a stream that was opened towards `stage`, and answer it."""
    try:
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            first = await stream.read()
    except TimeoutError as error:
        raise WireError("a stream was opened, but no greeting came") from error
    hello = Decoder(Expectation(fence, (), 0)).feed(first) if first is not None else None
    if not isinstance(hello, Hello) or hello.stage != stage:
        raise WireError(f"expected a greeting for stage {stage}, found {hello}")
    await _write(stream, hello)
    return hello


async def until_closed(stream: ByteStream) -> None:
    """Watch a stream on which the other side only listens. It raises NodeLost when that side is gone: a writer
    would notice only with its next message."""
    while await stream.read() is not None:
        pass
    raise NodeLost("the stage behind this stream hung up")


async def _write(stream: ByteStream, hello: Hello) -> None:
    for message in encode(hello):
        await stream.write(message)
