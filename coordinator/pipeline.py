"""The coordinator's end of the data plane: steps to the first stage, outcomes from the last.

One object per installed epoch. Knows what a step is, but not why it was chosen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.codec import Decoder, Expectation, encode
from cluster.errors import ClusterError, NodeLost, StepTimeout, WireError
from cluster.frames import Frame, Hello, Outcome, StreamRole
from cluster.handshake import greet, until_closed
from cluster.limits import FIRST_STEP_TIMEOUT_S, STEP_TIMEOUT_S
from cluster.narrow_frames import narrow_tokens
from cluster.plan import Fence
from cluster.steps import StageMark, Step, StepDone, StepOutcome
from cluster.transport import ClientStream, Credentials, open_stream
from cluster.types import StepId
from coordinator.narrowing import Narrowing


@dataclass(frozen=True, slots=True)
class TimedOutcome:
    """An outcome and where the time since its dispatch went."""

    outcome: StepOutcome
    elapsed_s: float
    rows: int
    tokens: int
    worked_s: float = 0.0  # of it the coordinator's own processor time

    @property
    def marks(self) -> tuple[StageMark, ...]:
        return self.outcome.marks if isinstance(self.outcome, StepDone) else ()

    @property
    def hops_s(self) -> float:
        """Time on links and in event loops: what no stage accounts for."""
        busy_s = sum(mark.receive_s + mark.queue_s + mark.compute_s for mark in self.marks)
        return max(0.0, self.elapsed_s - busy_s)

    @property
    def away_s(self) -> float:
        """Time on links: what neither a stage nor the coordinator's own work accounts for."""
        stages_s = sum(mark.queue_s + mark.compute_s for mark in self.marks)
        return max(0.0, self.elapsed_s - stages_s - self.worked_s)


@dataclass(frozen=True, slots=True)
class _Sent:
    at_s: float
    cpu_s: float
    rows: int
    tokens: int
    narrow_tokens: int  # of them, on the links of `narrowing`
    narrowing: tuple[int, ...]


class Pipeline:
    """Streams to the first and the last stage of one epoch."""

    def __init__(
        self,
        fence: Fence,
        first: ClientStream,
        last: ClientStream,
        narrowing: Narrowing,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.fence = fence
        self._first = first
        self._last = last
        self.narrowing = narrowing
        self._now = now
        self._sent: dict[StepId, _Sent] = {}
        self._outbox: asyncio.Queue[Frame] = asyncio.Queue()
        self._answered = False

    @classmethod
    async def connect(
        cls,
        credentials: Credentials,
        fence: Fence,
        first_address: str,
        last_address: str,
        last_stage: int,
        narrowing: Narrowing,
    ) -> Pipeline:
        """Dial both ends and agree on the epoch with them."""
        first, last = open_stream(credentials, first_address), open_stream(credentials, last_address)
        pipeline = cls(fence, first, last, narrowing)
        try:
            await greet(first, Hello(fence, 0, StreamRole.UPSTREAM))
            await greet(last, Hello(fence, last_stage, StreamRole.RESULTS))
        except (ClusterError, WireError):
            await pipeline.close()
            raise
        return pipeline

    def send(self, step: Step) -> None:
        """Dispatch `step`; it leaves in the order of the calls."""
        narrowing = self.narrowing.choose(step)
        counts = len(step.rows), step.token_count, narrow_tokens(step) if narrowing else 0
        self._sent[step.id] = _Sent(self._now(), time.thread_time(), *counts, narrowing)
        self._outbox.put_nowait(Frame(self.fence, step, narrowing=narrowing))

    async def run(self, on_outcome: Callable[[TimedOutcome], None]) -> None:
        """Move steps and outcomes until something breaks, which raises: NodeLost, StepTimeout or WireError."""
        work = (self._write(), self._read(on_outcome), self._watch_deadlines(), until_closed(self._first))
        tasks = [asyncio.create_task(item) for item in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self) -> None:
        while True:
            for message in encode(await self._outbox.get()):
                await self._first.write(message)

    async def _read(self, on_outcome: Callable[[TimedOutcome], None]) -> None:
        decoder = Decoder(Expectation(self.fence, (), 0))
        while (message := await self._last.read()) is not None:
            decoded = decoder.feed(message)
            if not isinstance(decoded, Outcome):
                raise WireError(f"expected an outcome from the last stage, found {type(decoded).__name__}")
            sent = self._sent.pop(decoded.result.step, None)
            if sent is not None:
                self._answered = True
                worked_s = time.thread_time() - sent.cpu_s
                timed = TimedOutcome(decoded.result, self._now() - sent.at_s, sent.rows, sent.tokens, worked_s)
                self.narrowing.note(timed.marks, sent.tokens, sent.narrow_tokens, sent.narrowing)
                on_outcome(timed)
        raise NodeLost("the last stage hung up")

    async def _watch_deadlines(self) -> None:
        """Steps come back in order, so the oldest one tells whether the pipeline is stuck."""
        while True:
            await asyncio.sleep(0.5)
            limit_s = STEP_TIMEOUT_S if self._answered else FIRST_STEP_TIMEOUT_S
            oldest = next(iter(self._sent.values()), None)
            if oldest is not None and self._now() - oldest.at_s > limit_s:
                raise StepTimeout(f"a step did not come back within {limit_s:.0f} s; a stage is stuck")

    async def close(self) -> None:
        await asyncio.gather(self._first.close(), self._last.close(), return_exceptions=True)
