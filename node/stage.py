"""Runs the steps of one loaded stage: cache verbs, the engine, and the draw when it holds the last layers.

Synchronous and single-threaded: the caller gives it one frame at a time. Knows no sockets and no neighbours.
A step that fails becomes a value that travels on; it never takes the node down.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.errors import PotluckError
from cluster.frames import Frame, Outcome
from cluster.steps import (
    Boundary,
    CacheVerb,
    Drawn,
    Drop,
    Fork,
    Honoured,
    Move,
    Row,
    StageMark,
    StepDone,
    StepFailed,
    Trim,
)
from cluster.types import SequenceId
from node.engine import Engine, Logits
from node.sampling import draw

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Computed:
    """What became of a step's rows: a boundary, or drawn tokens on the last stage, or a failure."""

    tensors: Boundary = ()
    drawn: tuple[Drawn, ...] = ()
    failure: StepFailed | None = None


class StageRunner:
    """An engine plus what sampling needs to know: each sequence's token ids so far."""

    def __init__(
        self, engine: Engine, *, stage: int, is_last: bool, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._engine = engine
        self._stage = stage
        self._is_last = is_last
        self._clock = clock
        self._tokens: dict[SequenceId, list[int]] = {}
        self.capacity = engine.capacity()  # as of the last step; readable from any thread

    def run(self, frame: Frame, *, receive_s: float, queue_s: float) -> Frame | Outcome:
        """Compute `frame`: what the next stage needs, or the outcome when this is the last one."""
        began = self._clock()
        honoured = tuple(kept for verb in frame.step.verbs if (kept := self._apply(verb)))
        merged = _smallest(frame.honoured, honoured)
        computed = _Computed(failure=frame.failure)
        if frame.failure is None and frame.step.rows:
            computed = self._compute(frame)
        self.capacity = self._engine.capacity()
        mark = StageMark(self._stage, receive_s, queue_s, self._clock() - began)
        marks = (*frame.marks, mark)
        if self._is_last:
            if computed.failure is not None:
                return Outcome(frame.fence, replace(computed.failure, honoured=merged))
            return Outcome(frame.fence, StepDone(frame.step.id, computed.drawn, merged, marks))
        return replace(frame, tensors=computed.tensors, honoured=merged, marks=marks, failure=computed.failure)

    def _apply(self, verb: CacheVerb) -> Honoured | None:
        match verb:
            case Drop(seq):
                self._engine.drop(seq)
                self._tokens.pop(seq, None)
                return None
            case Trim(seq, length):
                kept = self._engine.trim(seq, length)
                del self._tokens.get(seq, [])[kept:]
                return Honoured(seq, kept)
            case Fork(src, dst, length):
                kept = self._engine.fork(src, dst, length)
                self._tokens[dst] = self._tokens.get(src, [])[:kept]
                return Honoured(dst, kept)
            case Move(src, dst, length):
                kept = self._engine.move(src, dst, length)
                self._tokens[dst] = self._tokens.pop(src, [])[:kept]
                return Honoured(dst, kept)

    def _compute(self, frame: Frame) -> _Computed:
        rows = frame.step.rows
        before = {row.seq: self._engine.length(row.seq) for row in rows}
        try:
            output = self._engine.step(rows, frame.tensors or None)
            if self._is_last:  # only who draws needs to know what came before
                for row in rows:
                    self._tokens.setdefault(row.seq, [])[row.start :] = row.tokens
            if isinstance(output, np.ndarray):
                return _Computed(drawn=self._draw(rows, output))
            return _Computed(tensors=output)
        # Whatever a library raises on these rows must fail these rows and nothing else: this is the boundary
        # between other people's model code and a process that serves other requests.
        except Exception as error:  # noqa: BLE001 - the reason is above
            if not isinstance(error, PotluckError):
                _log.exception("step %d failed in the engine", frame.step.id)
            for seq, length in before.items():
                if self._engine.length(seq) > length:
                    self._engine.trim(seq, length)
            blamed = (rows[0].seq,) if len(rows) == 1 else ()
            reason = str(error) if isinstance(error, PotluckError) else f"{type(error).__name__}: {error}"
            return _Computed(failure=StepFailed(frame.step.id, self._stage, reason[:500], blamed))

    def _draw(self, rows: Sequence[Row], logits: Logits) -> tuple[Drawn, ...]:
        drawing = [row for row in rows if row.draw is not None]
        return tuple(
            Drawn(row.seq, row.end, draw(logits[index], row.draw, self._tokens[row.seq]))
            for index, row in enumerate(drawing)
            if row.draw is not None
        )

    def close(self) -> None:
        self._tokens.clear()
        self._engine.close()


def _smallest(earlier: Sequence[Honoured], here: Sequence[Honoured]) -> tuple[Honoured, ...]:
    """For each sequence the shortest length that any stage so far has kept."""
    lengths: dict[SequenceId, int] = {item.seq: item.length for item in earlier}
    for item in here:
        lengths[item.seq] = min(item.length, lengths.get(item.seq, item.length))
    return tuple(Honoured(seq, length) for seq, length in lengths.items())
