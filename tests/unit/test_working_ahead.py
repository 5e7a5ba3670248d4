"""A step begins while the one before it is computed, where neither can touch the other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.codec import Expectation, encode
from cluster.frames import Frame, Outcome
from cluster.steps import Boundary, CacheVerb, Drawn, Drop, Row, Step, StepDone, StepFailed
from cluster.types import SequenceId, StepId
from node.engine import Finish, Logits
from node.flow import StageFlow
from node.stage import AHEAD_TOKENS_MAX, StageRunner
from tests.unit.test_stage import FENCE, GREEDY, CountingEngine

ONE, TWO, THREE = SequenceId(1), SequenceId(2), SequenceId(3)


class AheadEngine(CountingEngine):
    """Notes when steps begin and when they are finished; those of `lost` sequences fail only then."""

    def __init__(self) -> None:
        super().__init__(is_last=True)
        self.notes: list[tuple[str, tuple[SequenceId, ...]]] = []
        self.lost: set[SequenceId] = set()

    def begin(self, rows: Sequence[Row], inputs: Boundary | None) -> Finish:
        seqs = tuple(row.seq for row in rows)
        self.notes.append(("begun", seqs))
        output = self.step(rows, inputs)

        def finish() -> Boundary | Logits:
            self.notes.append(("finished", seqs))
            if self.lost & set(seqs):
                raise RuntimeError("the device gave up")
            return output

        return finish


def frame(step: int, *rows: Row, verbs: tuple[CacheVerb, ...] = ()) -> Frame:
    return Frame(FENCE, Step(StepId(step), verbs, rows))


def decode(seq: SequenceId, start: int = 0) -> Row:
    return Row(seq, start, (7,), GREEDY)


class Waiting:
    """Frames that are all there at once, and outcomes as they come."""

    def __init__(self, *frames: Frame) -> None:
        self._messages = [message for item in frames for message in encode(item)]
        self.outcomes: asyncio.Queue[bytes] = asyncio.Queue()

    async def read(self) -> bytes | None:
        return self._messages.pop(0) if self._messages else None

    async def write(self, message: bytes) -> None:
        await self.outcomes.put(message)


async def flowed(engine: CountingEngine, *frames: Frame) -> None:
    """Every frame becomes an outcome; all of them wait when the engine begins."""
    stream, all_there = Waiting(*frames), threading.Event()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(all_there.wait, 10)
        stage = StageRunner(engine, stage=0, is_last=True)
        flow = StageFlow(stage, Expectation(FENCE, (), 50), stage=0, is_last=True, engine_thread=thread)
        delivering = asyncio.create_task(flow.deliver(stream))
        await flow.receive(stream)
        all_there.set()
        for _ in frames:
            await asyncio.wait_for(stream.outcomes.get(), 10)
        assert flow.steps_done == len(frames) and not flow.problem
        delivering.cancel()
        await flow.close()


def test_what_waits_is_begun_before_the_step_ahead_is_finished() -> None:
    engine = AheadEngine()
    asyncio.run(flowed(engine, frame(1, decode(ONE)), frame(2, decode(TWO)), frame(3, decode(THREE))))
    assert engine.notes == [
        ("begun", (ONE,)),
        ("begun", (TWO,)),
        ("finished", (ONE,)),
        ("begun", (THREE,)),
        ("finished", (TWO,)),
        ("finished", (THREE,)),
    ]


@pytest.mark.parametrize(
    "second",
    [
        frame(2, decode(ONE, 1)),
        frame(2, decode(TWO), verbs=(Drop(ONE),)),
        frame(2, Row(TWO, 0, (7,) * (AHEAD_TOKENS_MAX + 1))),
    ],
    ids=["of the same sequence", "with verbs", "a prefill chunk"],
)
def test_what_could_touch_the_step_ahead_waits_for_it(second: Frame) -> None:
    engine = AheadEngine()
    asyncio.run(flowed(engine, frame(1, decode(ONE)), second))
    assert [what for what, _ in engine.notes] == ["begun", "finished", "begun", "finished"]


def test_nothing_begins_beside_a_prefill_chunk() -> None:
    engine = AheadEngine()
    asyncio.run(flowed(engine, frame(1, Row(ONE, 0, (7,) * (AHEAD_TOKENS_MAX + 1))), frame(2, decode(TWO))))
    assert [what for what, _ in engine.notes] == ["begun", "finished", "begun", "finished"]


def test_a_step_that_fails_while_it_is_computed_takes_nothing_with_it() -> None:
    engine = AheadEngine()
    stage = StageRunner(engine, stage=0, is_last=True, clock=lambda: 0.0)
    engine.lost = {ONE}
    first = stage.begin(frame(1, decode(ONE)), receive_s=0.0, queue_s=0.0)
    assert stage.may_begin(frame(2, decode(TWO)), first)
    second = stage.begin(frame(2, decode(TWO)), receive_s=0.0, queue_s=0.0)
    failed, done = stage.finish(first), stage.finish(second)
    assert isinstance(failed, Outcome) and isinstance(failed.result, StepFailed)
    assert failed.result.seqs == (ONE,) and "gave up" in failed.result.reason
    assert isinstance(done, Outcome) and isinstance(done.result, StepDone)
    assert done.result.drawn == (Drawn(TWO, 1, 1),)
    assert (engine.length(ONE), engine.length(TWO)) == (0, 1)


def test_an_engine_that_computes_at_once_is_never_asked_to_begin_early() -> None:
    engine = CountingEngine(is_last=True)
    stage = StageRunner(engine, stage=0, is_last=True)
    first = stage.begin(frame(1, decode(ONE)), receive_s=0.0, queue_s=0.0)
    assert not stage.may_begin(frame(2, decode(TWO)), first)
