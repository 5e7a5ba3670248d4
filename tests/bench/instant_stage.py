"""A stage that answers every step at once with tokens from a list: what is left of a step is coordinator and wire.

A process of its own, so that its work is not counted as the coordinator's: `python -m tests.bench.instant_stage`
prints its port and serves until it is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator

from cluster.cli.running import run_async
from cluster.codec import Decoder, Expectation, encode
from cluster.frames import Frame, Outcome, StreamRole
from cluster.handshake import answer_greeting
from cluster.plan import Fence
from cluster.steps import Drawn, StageMark, StepDone
from cluster.transport import ByteStream, Credentials, create_server, data_service
from cluster.types import DeploymentId, Epoch

FENCE = Fence(DeploymentId("bench"), Epoch(1))
VOCABULARY = 1024
PLAIN_FROM = 16
"""Ids below are the demo model's special tokens, which show no text."""


class InstantStage:
    """The only stage of a pipeline; it keeps no cache and computes nothing."""

    def __init__(self) -> None:
        self._outcomes: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self._tokens = _tokens()

    async def serve(self, stream: ByteStream) -> None:
        hello = await answer_greeting(stream, FENCE, 0)
        match hello.role:
            case StreamRole.RESULTS:
                while True:
                    for outcome in await self._outcomes.get():
                        await stream.write(outcome)
            case StreamRole.UPSTREAM:
                decoder = Decoder(Expectation(FENCE, (), VOCABULARY))
                while (message := await stream.read()) is not None:
                    frame = decoder.feed(message)
                    assert isinstance(frame, Frame)
                    self._outcomes.put_nowait(encode(self._answer(frame)))

    def _answer(self, frame: Frame) -> Outcome:
        drawn = tuple(Drawn(row.seq, row.end, next(self._tokens)) for row in frame.step.rows if row.draw is not None)
        return Outcome(FENCE, StepDone(frame.step.id, drawn, (), (StageMark(0, 0.0, 0.0, 0.0),)))


def _tokens() -> Iterator[int]:
    rng = random.Random(0)
    return itertools.cycle([rng.randrange(PLAIN_FROM, VOCABULARY) for _ in range(10_007)])


async def _main() -> None:
    server = create_server()
    server.add_generic_rpc_handlers((data_service(InstantStage().serve),))
    port = Credentials().bind(server, "127.0.0.1:0")
    await server.start()
    print(port, flush=True)  # noqa: T201 - whoever started this process waits for it
    await server.wait_for_termination()


if __name__ == "__main__":
    run_async(_main())
