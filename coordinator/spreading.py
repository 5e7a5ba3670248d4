"""How many steps are in flight: one for each stage, and more where steps spend long on links.

While a step is on a link no stage works on it, so with one step for each stage they wait for it. Another step fills the
gap, but parts the running answers into smaller steps, each with its fixed cost; so it is decided by what both take.
Pure; its only clock is the times that it is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from cluster.steps import StageMark
from coordinator.pacing import Pace

AWAY_S_MIN: Final = 0.002
"""Below this, what no stage accounts for is work of the machines themselves, which more steps would only increase."""

LEARNT: Final = 0.05
"""Of how long a step was away, with each new one: one late frame in twenty counts for what it takes on average."""

GAIN_MIN: Final = 0.05
"""Of an answer's time per token, for which steps are made smaller; less is within what estimates are off by."""

STEPS_PER_STAGE_MAX: Final = 4
"""A newcomer waits for those that are in flight."""

PROMPT_STEPS_PER_STAGE_MAX: Final = 2
"""One on each stage and one on each link."""


class Spread:
    """The steps of one installed plan."""

    def __init__(self, stages: int, pace: Pace) -> None:
        self._stages = stages
        self._pace = pace
        self._away_s = 0.0  # a decode step's time on links
        self._prompt_away = 0.0  # a prompt chunk's time on links, over its time on the slowest stage

    def note(self, marks: Sequence[StageMark], away_s: float, rows: int, tokens: int) -> None:
        """A step with so many decode rows, and prompt tokens beside them, was on links for so long in all."""
        slowest_s = max((mark.compute_s for mark in marks), default=0.0)
        if rows and not tokens:
            self._away_s += LEARNT * (away_s - self._away_s)
        elif tokens and not rows and slowest_s:
            share = away_s / slowest_s if away_s > AWAY_S_MIN else 0.0
            self._prompt_away += 4 * LEARNT * (share - self._prompt_away)

    def steps(self, answers: int) -> int:
        """How many may be in flight while so many answers run."""
        if not answers:
            most = PROMPT_STEPS_PER_STAGE_MAX * self._stages
            more = math.ceil(self._prompt_away - GAIN_MIN * self._stages)
            return min(self._stages + max(0, more), most)
        if self._away_s < AWAY_S_MIN:
            return self._stages
        most = max(self._stages, min(answers, STEPS_PER_STAGE_MAX * self._stages))
        best = min(range(self._stages, most + 1), key=lambda steps: self._round_s(answers, steps))
        gains = self._round_s(answers, best) <= (1 - GAIN_MIN) * self._round_s(answers, self._stages)
        return best if gains else self._stages

    def _round_s(self, answers: int, steps: int) -> float:
        """An answer's time per token: its step's way through everything, or all steps on the slowest stage."""
        step_s = self._pace.alone_s(-(-answers // steps))
        return max(steps * step_s, self._stages * step_s + self._away_s)
