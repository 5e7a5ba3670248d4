"""What a stage does with a step, on an engine that computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from cluster.frames import Frame, Outcome
from cluster.plan import Fence
from cluster.rewinding import EXACT
from cluster.steps import (
    Boundary,
    CacheVerb,
    Draw,
    Drawn,
    Drop,
    Fork,
    Honoured,
    Move,
    Row,
    Sampling,
    Step,
    StepDone,
    StepFailed,
    Trim,
)
from cluster.types import Backend, DeploymentId, DType, Epoch, HostTensor, SequenceId, StepId
from node.engine import Capacity, Logits, Progress, StageSpec
from node.stage import StageRunner

FENCE = Fence(DeploymentId("d"), Epoch(1))
GREEDY = Draw(Sampling(seed=0, temperature=0.0), prompt_tokens=1)
ONE, TWO = SequenceId(1), SequenceId(2)


class CountingEngine:
    """Holds lengths only. The likeliest token is the row's last position; `broken` rows raise midway."""

    backend = Backend.TORCH
    rewind = EXACT

    def __init__(self, is_last: bool) -> None:
        self.is_last = is_last
        self.lengths: dict[SequenceId, int] = {}
        self.broken: set[SequenceId] = set()

    def load(self, spec: StageSpec, progress: Progress) -> None:
        raise NotImplementedError

    def step(self, rows: Sequence[Row], inputs: Boundary | None) -> Boundary | Logits:
        for row in rows:
            self.lengths[row.seq] = row.end
            if row.seq in self.broken:
                raise RuntimeError("the kernel gave up")
        if self.is_last:
            return np.eye(50, dtype=np.float32)[[row.end for row in rows if row.draw]]
        return (HostTensor(DType.U8, (sum(len(row.tokens) for row in rows),), b"x" * sum(len(r.tokens) for r in rows)),)

    def fork(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        self.lengths[dst] = min(length, self.lengths.get(src, 0))
        return self.lengths[dst]

    def move(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        self.lengths[dst] = min(length, self.lengths.pop(src, 0))
        return self.lengths[dst]

    def trim(self, seq: SequenceId, length: int) -> int:
        self.lengths[seq] = min(length, self.lengths.get(seq, 0))
        return self.lengths[seq]

    def drop(self, seq: SequenceId) -> None:
        self.lengths.pop(seq, None)

    def length(self, seq: SequenceId) -> int:
        return self.lengths.get(seq, 0)

    def capacity(self) -> Capacity:
        return Capacity(100, sum(self.lengths.values()), len(self.lengths), 0, 0)

    def close(self) -> None:
        self.lengths.clear()


def runner(is_last: bool) -> tuple[StageRunner, CountingEngine]:
    engine = CountingEngine(is_last)
    return StageRunner(engine, stage=1, is_last=is_last, clock=lambda: 0.0), engine


def run(stage: StageRunner, *rows: Row, verbs: tuple[CacheVerb, ...] = (), **changes: object) -> Frame | Outcome:
    frame = Frame(FENCE, Step(StepId(5), verbs, rows), **changes)  # type: ignore[arg-type]
    return stage.run(frame, receive_s=0.0, queue_s=0.0)


def done(result: Frame | Outcome) -> StepDone:
    assert isinstance(result, Outcome)
    assert isinstance(result.result, StepDone)
    return result.result


def test_a_middle_stage_passes_the_step_on_with_its_tensors_and_a_mark() -> None:
    stage, _ = runner(is_last=False)
    result = run(stage, Row(ONE, 0, (7, 8)))
    assert isinstance(result, Frame)
    assert result.tensors[0].shape == (2,)
    assert [mark.stage for mark in result.marks] == [1]
    assert stage.capacity.kv_tokens_used == 2


def test_the_last_stage_draws_for_the_rows_that_ask() -> None:
    stage, _ = runner(is_last=True)
    result = done(run(stage, Row(ONE, 0, (7, 8)), Row(TWO, 0, (7, 8, 9), GREEDY)))
    assert result.drawn == (Drawn(TWO, 3, 3),)


def test_penalties_know_the_tokens_that_came_before_and_after_a_trim() -> None:
    stage, _ = runner(is_last=True)
    banning = Draw(Sampling(seed=0, temperature=0.0, presence_penalty=5.0), prompt_tokens=0)
    assert done(run(stage, Row(ONE, 0, (3, 3, 3), banning))).drawn[0].token != 3
    assert done(run(stage, Row(ONE, 1, (9, 9), banning), verbs=(Trim(ONE, 1),))).drawn[0].token != 3
    assert done(run(stage, Row(ONE, 0, (9, 9, 9), banning), verbs=(Trim(ONE, 0),))).drawn[0].token == 3


def test_verbs_report_the_smallest_length_that_any_stage_kept() -> None:
    stage, engine = runner(is_last=True)
    engine.lengths[ONE] = 9
    result = run(stage, verbs=(Trim(ONE, 8), Fork(ONE, TWO, 6)), honoured=(Honoured(ONE, 4),))
    assert done(result).honoured == (Honoured(ONE, 4), Honoured(TWO, 6))


def test_penalties_know_the_tokens_that_a_fork_and_a_move_brought() -> None:
    banning = Draw(Sampling(seed=0, temperature=0.0, presence_penalty=5.0), prompt_tokens=0)
    for verb in (Fork(ONE, TWO, 2), Move(ONE, TWO, 2)):
        stage, engine = runner(is_last=True)
        run(stage, Row(ONE, 0, (9, 3, 4)))
        result = done(run(stage, Row(TWO, 2, (9,), banning), verbs=(verb,)))
        assert result.honoured == (Honoured(TWO, 2),)
        assert result.drawn[0].token != 3  # the row's last position, and the forked sequence's second token
        left = done(run(stage, Row(ONE, engine.length(ONE), (9, 9, 9, 9)[engine.length(ONE) :], banning)))
        assert (left.drawn[0].token == 4) == isinstance(verb, Move)  # only a moved sequence forgets the 4 that it had


@pytest.mark.parametrize("verb", [Fork(ONE, TWO, 2), Move(ONE, TWO, 2)])
def test_what_cannot_be_shared_is_computed(
    verb: CacheVerb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device without memory for a copy, say: nobody else is hurt."""

    def fail(src: SequenceId, dst: SequenceId, length: int) -> int:
        raise RuntimeError("out of memory")

    stage, engine = runner(is_last=True)
    run(stage, Row(ONE, 0, (7, 8, 9)))
    monkeypatch.setattr(engine, "fork", fail)
    monkeypatch.setattr(engine, "move", fail)
    assert done(run(stage, verbs=(verb,))).honoured == (Honoured(TWO, 0),)
    assert engine.length(TWO) == 0
    assert engine.length(ONE) == (3 if isinstance(verb, Fork) else 0), "what has moved is nobody's any more"
    assert "could not be shared" in caplog.text


def test_a_failing_row_fails_its_step_alone_and_leaves_the_cache_as_it_was() -> None:
    stage, engine = runner(is_last=True)
    run(stage, Row(ONE, 0, (7,), GREEDY))
    engine.broken = {TWO}
    result = run(stage, Row(ONE, 1, (7,), GREEDY), Row(TWO, 0, (7, 8), GREEDY))
    assert isinstance(result, Outcome)
    assert isinstance(result.result, StepFailed)
    assert (result.result.seqs, engine.lengths) == ((), {ONE: 1, TWO: 0})
    assert "the kernel gave up" in result.result.reason


def test_a_row_that_fails_alone_is_to_blame() -> None:
    stage, engine = runner(is_last=True)
    engine.broken = {ONE}
    result = run(stage, Row(ONE, 0, (7,), GREEDY))
    assert isinstance(result, Outcome)
    assert isinstance(result.result, StepFailed)
    assert result.result.seqs == (ONE,)


def test_a_failure_upstream_is_passed_on_with_the_verbs_obeyed() -> None:
    stage, engine = runner(is_last=True)
    engine.lengths.update({ONE: 5, TWO: 3})
    failure = StepFailed(StepId(5), 0, "stage 0 gave up")
    result = run(stage, Row(ONE, 0, (7,), GREEDY), verbs=(Drop(TWO), Trim(ONE, 4)), failure=failure)
    assert isinstance(result, Outcome)
    assert result.result == replace(failure, honoured=(Honoured(ONE, 4),))
    assert engine.lengths == {ONE: 4}


def test_a_step_of_verbs_alone_computes_nothing() -> None:
    stage, engine = runner(is_last=True)
    engine.lengths[ONE] = 3
    assert done(run(stage, verbs=(Drop(ONE),))).drawn == ()
    assert engine.lengths == {}


@pytest.mark.parametrize("is_last", [False, True])
def test_what_the_engine_holds_is_known_after_each_step(is_last: bool) -> None:
    stage, _ = runner(is_last)
    run(stage, Row(ONE, 0, (7, 8), GREEDY))
    assert (stage.capacity.kv_tokens_used, stage.capacity.sequences) == (2, 1)
