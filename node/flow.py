"""The asynchronous life of one installed stage: frames in, the engine, frames or outcomes out.

Receiving, computing and sending proceed at once: a queue before the engine thread, and an ordered outbox towards the
next stage or the coordinator; both together are bounded. Knows streams, but not how they were opened or what a step
means.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

from cluster.codec import Decoder, Expectation, encode
from cluster.errors import ClusterError, NodeLost, PotluckError, WireError
from cluster.frames import Frame, Hello, Outcome, StreamRole
from cluster.handshake import greet, until_closed
from cluster.narrow_frames import error_of_narrowing, narrowed, widened
from cluster.plan import Fence
from cluster.transport import ByteStream, ClientStream, Credentials, open_stream
from node.engine import Capacity
from node.engine_queue import EngineQueue
from node.stage import Begun, StageRunner

_log = logging.getLogger(__name__)

_FRAMES_HELD: Final = 64
"""Frames that wait for the engine or to be sent on. The coordinator keeps about one per stage in flight; beyond this
many, gRPC's flow control holds the sender back."""

_PROBLEM_CHARS_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class _Arrived:
    frame: Frame
    receive_s: float
    at_s: float


class StageFlow:
    """One stage of one epoch, from the moment it is loaded until it is replaced."""

    def __init__(
        self, runner: StageRunner, expectation: Expectation, *, stage: int, is_last: bool, engine_thread: Executor
    ) -> None:
        self.expectation = expectation
        self.stage = stage
        self.is_last = is_last
        self.steps_done = 0
        self.problem = ""
        self.narrow_error: float | None = None  # of the latest activations that went on in eight bits
        self._runner = runner
        self._engine_thread = engine_thread
        self._room = asyncio.Semaphore(_FRAMES_HELD)
        self._inbox: EngineQueue[_Arrived, Frame | Outcome] = EngineQueue(
            engine_thread, self._compute, self._computed, self.give_up
        )
        self._begun: Begun | None = None  # with the first frame that waits for the engine; the engine thread's own
        self._outbox: asyncio.Queue[Frame | Outcome] = asyncio.Queue()
        self._next: ClientStream | None = None
        self._results_taken = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def fence(self) -> Fence:
        return self.expectation.fence

    @property
    def steps_queued(self) -> int:
        return len(self._inbox)

    @property
    def capacity(self) -> Capacity:
        return self._runner.capacity

    async def connect_next(self, credentials: Credentials, address: str) -> None:
        """Dial the stage after this one and agree on the epoch."""
        stream = open_stream(credentials, address)
        hello = Hello(self.fence, self.stage + 1, StreamRole.UPSTREAM)
        try:
            await greet(stream, hello)
        except BaseException as error:
            await stream.close()
            if not isinstance(error, ClusterError | WireError):
                raise  # cancelled: whoever asked has gone
            raise NodeLost(f"stage {self.stage} cannot reach stage {self.stage + 1} at {address}: {error}") from error
        self._next = stream
        self._start(self._write_all(stream))
        self._start(until_closed(stream))

    async def receive(self, stream: ByteStream) -> None:
        """Take frames from the stage before this one (or the coordinator) until the stream ends."""
        decoder = Decoder(self.expectation)
        began = time.perf_counter()
        fresh = True
        while (message := await stream.read()) is not None:
            if fresh:
                began = time.perf_counter()
            decoded = decoder.feed(message)
            fresh = decoded is not None
            if isinstance(decoded, Frame):
                now = time.perf_counter()
                if decoded.narrow:  # in a thread: megabytes would hold up the loop for milliseconds
                    decoded = await asyncio.to_thread(widened, decoded)
                await self._room.acquire()
                self._inbox.put(_Arrived(decoded, now - began, now))
            elif decoded is not None:
                raise WireError(f"expected frames on this stream, found a {type(decoded).__name__}")

    async def deliver(self, stream: ByteStream) -> None:
        """Send outcomes to the coordinator on its own stream, until that stream breaks."""
        if not self.is_last:
            raise WireError(f"stage {self.stage} is not the last one; it has no results to deliver")
        if self._results_taken:
            raise WireError(f"the results of {self.fence} are already being delivered on another stream")
        self._results_taken = True
        await self._write_all(stream)

    def _compute(self, arrived: _Arrived) -> Frame | Outcome:
        """On the engine thread: finish this step, having begun with the next one where that need not wait."""
        begun, self._begun = self._begun or self._begin(arrived), None
        following = self._inbox.next
        if following is not None and self._runner.may_begin(following.frame, begun):
            self._begun = self._begin(following)
        return self._runner.finish(begun)

    def _begin(self, arrived: _Arrived) -> Begun:
        queue_s = time.perf_counter() - arrived.at_s
        return self._runner.begin(arrived.frame, receive_s=arrived.receive_s, queue_s=queue_s)

    def _computed(self, result: Frame | Outcome) -> None:
        self.steps_done += 1
        self._outbox.put_nowait(result)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._note_end)
        self._tasks.append(task)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """A stage whose task has ended cannot serve. The heartbeat says so; the coordinator decides what to do."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.give_up(error)

    def give_up(self, error: BaseException) -> None:
        """This stage cannot serve any more, for this reason; only the first one counts."""
        text = str(error) if isinstance(error, PotluckError) else f"{type(error).__name__}: {error}"
        if not self.problem:
            self.problem = " ".join(text.split())[:_PROBLEM_CHARS_MAX]  # it travels as one line
            _log.error("stage %d stopped: %s", self.stage, self.problem)

    async def _write_all(self, stream: ByteStream) -> None:
        while True:
            result = await self._outbox.get()
            if isinstance(result, Frame) and result.tensors and self.stage in result.narrowing:
                result = await asyncio.to_thread(self._narrowed, result)
            for message in encode(result):
                await stream.write(message)
            self._inbox.taken()
            self._room.release()

    def _narrowed(self, frame: Frame) -> Frame:
        """In a thread, one frame at a time."""
        error = error_of_narrowing(frame)
        self.narrow_error = self.narrow_error if error is None else error
        return narrowed(frame)

    async def close(self) -> None:
        """Stop the tasks, hang up, and free the engine on its own thread."""
        self._inbox.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._next is not None:
            await self._next.close()
        await asyncio.get_running_loop().run_in_executor(self._engine_thread, self._runner.close)
