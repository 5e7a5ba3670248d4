"""Runs the steps of one loaded stage: cache verbs, the engine, and the draw when it holds the last layers.

Synchronous and single-threaded: the caller gives it one frame at a time. Knows no sockets and no neighbours.
A step that fails becomes a value that travels on; it never takes the node down.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

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
from node.engine import Engine, Finish, Logits, WorksAhead
from node.sampling import draw

_log = logging.getLogger(__name__)


AHEAD_TOKENS_MAX: Final = 64
"""New tokens of a step that begins before the one ahead of it is finished: decode rows, whose activations are nothing
beside those of a prefill chunk, for which alone plans have room."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A frame whose step is under way."""

    frame: Frame
    honoured: tuple[Honoured, ...]
    lengths: dict[SequenceId, int]  # of its rows' sequences, before it
    finish: Finish | None  # None when there is nothing to compute
    failure: StepFailed | None
    receive_s: float
    queue_s: float
    compute_s: float  # until now


class StageRunner:
    """An engine plus what sampling needs to know: each sequence's token ids so far."""

    def __init__(
        self, engine: Engine, *, stage: int, is_last: bool, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._engine = engine
        self._works_ahead = isinstance(engine, WorksAhead)
        self._stage = stage
        self._is_last = is_last
        self._clock = clock
        self._tokens: dict[SequenceId, list[int]] = {}
        self.capacity = engine.capacity()  # as of the last step; readable from any thread

    def run(self, frame: Frame, *, receive_s: float, queue_s: float) -> Frame | Outcome:
        """Compute `frame`: what the next stage needs, or the outcome when this is the last one."""
        return self.finish(self.begin(frame, receive_s=receive_s, queue_s=queue_s))

    def begin(self, frame: Frame, *, receive_s: float, queue_s: float) -> Begun:
        """Let the engine begin with `frame`. What has begun is to be finished, in this order."""
        began = self._clock()
        honoured = tuple(kept for verb in frame.step.verbs if (kept := self._apply(verb)))
        merged = _smallest(frame.honoured, honoured)
        lengths = {row.seq: self._engine.length(row.seq) for row in frame.step.rows}
        finish, failure = None, frame.failure
        if failure is None and frame.step.rows:
            try:
                finish = self._begin_rows(frame)
            # The same boundary as in `finish`.
            except Exception as error:  # noqa: BLE001 - the reason is there
                failure = self._failed(frame, lengths, error)
        return Begun(frame, merged, lengths, finish, failure, receive_s, queue_s, self._clock() - began)

    def may_begin(self, frame: Frame, before: Begun) -> bool:
        """Whether `frame` may begin while `before` is computed: where nothing that it does, or that may go wrong with
        either, touches the other."""
        step = frame.step
        return (
            self._works_ahead
            and not step.verbs
            and step.token_count <= AHEAD_TOKENS_MAX
            and before.frame.step.token_count <= AHEAD_TOKENS_MAX
            and not any(row.seq in before.lengths for row in step.rows)
        )

    def finish(self, begun: Begun) -> Frame | Outcome:
        """What the next stage needs, or the outcome when this is the last one."""
        began = self._clock()
        frame, failure = begun.frame, begun.failure
        tensors: Boundary = ()
        drawn: tuple[Drawn, ...] = ()
        if begun.finish is not None:
            try:
                output = begun.finish()
                if isinstance(output, np.ndarray):
                    drawn = self._draw(frame.step.rows, output)
                else:
                    tensors = output
            # Whatever a library raises on these rows must fail these rows and nothing else: this is the boundary
            # between other people's model code and a process that serves other requests.
            except Exception as error:  # noqa: BLE001 - the reason is above
                failure = self._failed(frame, begun.lengths, error)
        self.capacity = self._engine.capacity()
        compute_s = begun.compute_s + self._clock() - began
        marks = (*frame.marks, StageMark(self._stage, begun.receive_s, begun.queue_s, compute_s))
        if self._is_last:
            if failure is not None:
                return Outcome(frame.fence, replace(failure, honoured=begun.honoured))
            return Outcome(frame.fence, StepDone(frame.step.id, drawn, begun.honoured, marks))
        return replace(frame, tensors=tensors, honoured=begun.honoured, marks=marks, failure=failure)

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
                kept = self._shared(self._engine.fork, src, dst, length)
                self._tokens[dst] = self._tokens.get(src, [])[:kept]
                return Honoured(dst, kept)
            case Move(src, dst, length):
                kept = self._shared(self._engine.move, src, dst, length)
                self._engine.drop(src)  # where it could not be moved, nobody knows of it any more
                self._tokens[dst] = self._tokens.pop(src, [])[:kept]
                return Honoured(dst, kept)

    def _shared(
        self, share: Callable[[SequenceId, SequenceId, int], int], src: SequenceId, dst: SequenceId, length: int
    ) -> int:
        """So many tokens; none where the device has no memory for a copy, say: then they are computed."""
        try:
            return share(src, dst, length)
        except Exception as error:  # noqa: BLE001 - as in `finish`
            _log.error("a prefix of %d tokens could not be shared", length, exc_info=error)
            self._engine.drop(dst)
            return 0

    def _begin_rows(self, frame: Frame) -> Finish:
        rows, inputs = frame.step.rows, frame.tensors or None
        if isinstance(self._engine, WorksAhead):
            finish = self._engine.begin(rows, inputs)
        else:
            output = self._engine.step(rows, inputs)

            def finish() -> Boundary | Logits:
                return output

        if self._is_last:  # only who draws needs to know what came before
            for row in rows:
                self._tokens.setdefault(row.seq, [])[row.start :] = row.tokens
        return finish

    def _failed(self, frame: Frame, lengths: Mapping[SequenceId, int], error: Exception) -> StepFailed:
        if not isinstance(error, PotluckError):
            _log.error("step %d failed in the engine", frame.step.id, exc_info=error)
        for seq, length in lengths.items():
            if self._engine.length(seq) > length:
                self._engine.trim(seq, length)
        rows = frame.step.rows
        blamed = (rows[0].seq,) if len(rows) == 1 else ()
        reason = str(error) if isinstance(error, PotluckError) else f"{type(error).__name__}: {error}"
        return StepFailed(frame.step.id, self._stage, reason[:500], blamed)

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
