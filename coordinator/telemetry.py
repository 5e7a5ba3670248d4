"""Where each token's time went: a window over the latest decode steps, per stage and on the links."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from cluster.steps import StageMark
from coordinator.pipeline import TimedOutcome

_WINDOW_STEPS = 256
"""Enough to be steady, short enough to follow a change within seconds."""


@dataclass(frozen=True, slots=True)
class StageTime:
    """Means per step, in seconds."""

    receive_s: float
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class TokenTime:
    """Where a decode step's time went, as means over the window."""

    steps: int
    total_s: float
    hops_s: float  # links and event loops: what no stage accounts for
    stages: tuple[StageTime, ...]


class Telemetry:
    """Counts and windows of one installed plan."""

    def __init__(self) -> None:
        self._window: deque[TimedOutcome] = deque(maxlen=_WINDOW_STEPS)
        self.steps = 0
        self.tokens_drawn = 0
        self.stages_busy_s: tuple[float, ...] = ()  # each stage's computing, since the plan was installed
        self.decode_steps = 0  # without prefill, since then
        self.decode_hops_s = 0.0  # what no stage accounts for in all of those

    def note(self, timed: TimedOutcome, *, drawn: int, decode_only: bool) -> None:
        """Record a step. Only steps without prefill count for the time of a token."""
        self.steps += 1
        self.tokens_drawn += drawn
        if timed.marks:
            before = self.stages_busy_s or (0.0,) * len(timed.marks)
            self.stages_busy_s = tuple(s + mark.compute_s for s, mark in zip(before, timed.marks, strict=True))
        if decode_only and timed.marks:
            self._window.append(timed)
            self.decode_steps += 1
            self.decode_hops_s += timed.hops_s

    def token_time(self) -> TokenTime | None:
        """None until a decode step has come back."""
        window = list(self._window)
        if not window:
            return None
        stage_count = len(window[0].marks)
        return TokenTime(
            steps=len(window),
            total_s=fmean(timed.elapsed_s for timed in window),
            hops_s=fmean(timed.hops_s for timed in window),
            stages=tuple(_stage_time([timed.marks[index] for timed in window]) for index in range(stage_count)),
        )


def _stage_time(marks: Sequence[StageMark]) -> StageTime:
    return StageTime(
        receive_s=fmean(mark.receive_s for mark in marks),
        queue_s=fmean(mark.queue_s for mark in marks),
        compute_s=fmean(mark.compute_s for mark in marks),
    )
