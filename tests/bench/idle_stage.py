"""One stage of a pipeline as nodes run it, with an engine that computes nothing: its streams, its queues, its engine
thread and its frames are real, so what a step takes here is what a hop takes.

A process of its own: `python -m tests.bench.idle_stage INDEX COUNT [PORT_OF_THE_NEXT]` prints its port and serves
until it is killed.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cluster.cli.running import run_async
from cluster.codec import Expectation
from cluster.errors import ClusterError, WireError
from cluster.frames import StreamRole
from cluster.handshake import answer_greeting
from cluster.rewinding import EXACT
from cluster.steps import Boundary, Row
from cluster.transport import ByteStream, Credentials, create_server, data_service
from cluster.types import Backend, DType, HostTensor, SequenceId, TensorSpec
from node.engine import Capacity, Logits, Progress, StageSpec
from node.flow import StageFlow
from node.stage import StageRunner
from tests.bench.instant_stage import FENCE, PLAIN_FROM, VOCABULARY

BOUNDARY = (TensorSpec("hidden", (1024,), DType.BF16),)


class IdleEngine:
    """Answers with zeros, and on the last stage with logits that make some plain token certain."""

    backend = Backend.TORCH
    rewind = EXACT

    def __init__(self, is_last: bool) -> None:
        self._is_last = is_last
        self._lengths: dict[SequenceId, int] = {}
        self._rng = random.Random(0)
        self._logits = np.zeros((1, VOCABULARY), dtype=np.float32)

    def load(self, spec: StageSpec, progress: Progress) -> None:
        raise NotImplementedError

    def step(self, rows: Sequence[Row], inputs: Boundary | None) -> Boundary | Logits:
        for row in rows:
            self._lengths[row.seq] = row.end
        if self._is_last:
            logits = np.zeros((sum(row.draw is not None for row in rows), VOCABULARY), dtype=np.float32)
            for drawing in logits:
                drawing[self._rng.randrange(PLAIN_FROM, VOCABULARY)] = 1000.0
            return logits
        tokens = sum(len(row.tokens) for row in rows)
        return (HostTensor(DType.BF16, (tokens, 1024), bytes(tokens * 2048)),)

    def fork(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        raise NotImplementedError

    def move(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        raise NotImplementedError

    def trim(self, seq: SequenceId, length: int) -> int:
        raise NotImplementedError

    def drop(self, seq: SequenceId) -> None:
        self._lengths.pop(seq, None)

    def length(self, seq: SequenceId) -> int:
        return self._lengths.get(seq, 0)

    def capacity(self) -> Capacity:
        return Capacity(1, 0, len(self._lengths), 0, 0)

    def close(self) -> None:
        pass


async def _main(index: int, count: int, next_port: int | None) -> None:
    is_last = index == count - 1
    flow = StageFlow(
        StageRunner(IdleEngine(is_last), stage=index, is_last=is_last),
        Expectation(FENCE, BOUNDARY if index else (), VOCABULARY),
        stage=index,
        is_last=is_last,
        engine_thread=ThreadPoolExecutor(1),
    )

    async def serve(stream: ByteStream) -> None:
        hello = await answer_greeting(stream, FENCE, index)
        with contextlib.suppress(ClusterError, WireError):
            await (flow.receive(stream) if hello.role is StreamRole.UPSTREAM else flow.deliver(stream))

    server = create_server()
    server.add_generic_rpc_handlers((data_service(serve),))
    port = Credentials().bind(server, "127.0.0.1:0")
    await server.start()
    if next_port is not None:
        await flow.connect_next(Credentials(), f"127.0.0.1:{next_port}")
    print(port, flush=True)  # noqa: T201 - whoever started this process waits for it
    await server.wait_for_termination()


if __name__ == "__main__":
    run_async(_main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None))
