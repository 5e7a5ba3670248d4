"""How many prompt tokens a step takes, from what steps have cost so far.

Owns a small model of a step's time on the slowest stage: a fixed part, a part for each decode row, a part for each
prompt token. While answers run, a step may take about twice the time that it takes without a prompt, so that their
readers hardly notice one; less where steps often take longer than foreseen. While none runs, chunks are as large as is
useful: large enough to be efficient, small enough that whoever comes next does not wait long, and that all stages have
one to work on. Pure; its only clock is the times that it is told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from cluster.limits import STEP_TOKENS_MAX
from cluster.steps import StageMark

LEARNT: Final = 0.2
"""Of what a prompt's new step teaches; five steps make most of an estimate."""

KEPT: Final = 0.97
"""Of what is known of decode steps, with each new one: a second or two make most of an estimate."""

SLOWDOWN: Final = 2.5
"""A running answer's gap between tokens while a prompt is computed, over its gap alone: what ninety-nine gaps
of a hundred are meant to keep."""

SLOWDOWN_MIN: Final = 1.4
"""What is aimed at on the most restless machine; below it a prompt would hardly go on."""

TAIL: Final = 3.0
"""How many standard deviations longer than foreseen one step in a hundred takes. Measured 3.3; of a bell curve 2.3."""

RESTLESS: Final = 0.05
"""A step's standard deviation from what was foreseen, as a share of it, while nothing was measured."""

URGENCY: Final = 6
"""How much more a short prompt's wait for its first token counts than a running answer's wait for its next: many people
who come at once are answered soon, while the first of them pause a little. One long prompt never counts like this."""

STEP_S: Final = 0.5
"""Of prompt tokens in one step while nobody reads along: a newcomer waits for one step for each stage."""

FIXED_SHARE: Final = 0.2
"""Of a step's time that may go to its fixed part, where STEP_S would leave less: a machine that takes long for every
step takes more tokens with it."""

CHUNK_TOKENS_FIRST: Final = 512
"""While nothing was measured; beside running answers an eighth of it."""

CHUNK_TOKENS_MIN: Final = 32
"""Below this, frames and hops cost more than they help, while nobody reads along."""

PACED_TOKENS_MIN: Final = 4
"""A prompt always goes on, whatever it costs the others."""

GROWTH: Final = 1.5
"""By which a chunk beside running answers may exceed the last one: time does not grow evenly with tokens."""


class _Line:
    """A straight line through what was seen of steps of decode rows; the latest count most. Where all had as many rows,
    the slope stays what it was."""

    def __init__(self) -> None:
        self.fixed_s = 0.0
        self._row_s = 0.0
        self._weight = self._rows = self._took_s = self._square = self._product = 0.0

    def note(self, rows: int, took_s: float) -> None:
        self._weight = KEPT * self._weight + 1
        self._rows = KEPT * self._rows + rows
        self._took_s = KEPT * self._took_s + took_s
        self._square = KEPT * self._square + rows * rows
        self._product = KEPT * self._product + rows * took_s
        mean_rows, mean_s = self._rows / self._weight, self._took_s / self._weight
        spread = self._square - self._weight * mean_rows**2
        together = self._product - self._weight * mean_rows * mean_s
        self._row_s = min(max(0.0, (together + self._row_s) / (spread + 1)), mean_s / mean_rows)
        self.fixed_s = mean_s - self._row_s * mean_rows

    def at(self, rows: int) -> float:
        return self.fixed_s + self._row_s * rows


class _Surprise:
    """By how much steps beside answers take longer than foreseen, as a share of it: a standard deviation of which only
    one side is looked at, because an outlier makes the next ones seem short."""

    def __init__(self) -> None:
        self._variance = RESTLESS**2

    def note(self, foreseen_s: float, took_s: float) -> None:
        if foreseen_s <= 0:
            return  # stages that take no time surprise nobody
        longer = min(1.0, max(0.0, took_s / foreseen_s - 1))  # one that slept for a minute is no measure of others
        self._variance = KEPT * self._variance + (1 - KEPT) * 2 * longer * longer

    @property
    def deviation(self) -> float:
        return math.sqrt(self._variance)


class Pace:
    """The step costs of one installed plan."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._alone = _Line()
        self._token_s: float | None = None  # in steps of prompts only
        self._beside_s: float | None = None  # in steps while answers run: smaller chunks, and other products
        self._beside_tokens = 0  # the latest such chunk
        self._surprise = _Surprise()

    @property
    def token_s(self) -> float:
        """A prompt token's time on the slowest stage; 0 while nothing was measured."""
        return self._token_s or self._beside_s or 0.0

    # -- Learning ----------------------------------------------------------------------------------------

    def note(self, marks: Sequence[StageMark], rows: int, tokens: int, *, paced: bool) -> None:
        """A step with so many decode rows, and prompt tokens beside them, has come back."""
        if not marks or not rows + tokens:
            return
        took_s = max(mark.compute_s for mark in marks)
        if tokens == 0:
            self._alone.note(rows, took_s)
            return
        token_s = max(0.0, took_s - self.alone_s(rows)) / tokens
        if paced:
            if rows and self._beside_s is not None:
                self._surprise.note(self.alone_s(rows) + self._beside_s * tokens, took_s)
            self._beside_s = _nearer(self._beside_s, token_s)
            self._beside_tokens = tokens
        else:
            self._token_s = _nearer(self._token_s, token_s)

    def alone_s(self, rows: int) -> float:
        """A step of decode rows only."""
        return self._alone.at(rows)

    @property
    def slowdown(self) -> float:
        """What is aimed at, so that the promise is kept."""
        return max(SLOWDOWN_MIN, SLOWDOWN / (1 + TAIL * self._surprise.deviation))

    # -- Choosing ----------------------------------------------------------------------------------------

    def beside_answers(self, share: int, rows: int, prompts: Sequence[int], answers: int) -> int:
        """Prompt tokens for a step while `answers` run, `share` of them in each step, `rows` in this one, and prompts
        of such lengths wait. Where several short ones do, the answers are slowed down in proportion."""
        token_s = self._token_s if self._beside_s is None else self._beside_s
        if not self._alone.fixed_s or token_s is None:
            return CHUNK_TOKENS_FIRST // 8
        short = sum(tokens * token_s <= STEP_S for tokens in prompts)
        slowdown = self.slowdown * max(1.0, URGENCY * short / answers)
        left_s = slowdown * self.alone_s(share) - self.alone_s(rows)
        grown = int(GROWTH * max(self._beside_tokens, PACED_TOKENS_MIN)) + 1
        fitting = int(left_s / token_s) if token_s else STEP_TOKENS_MAX
        return max(PACED_TOKENS_MIN, min(fitting, grown, self._largest()))

    def alone(self, tokens_left: int) -> int:
        """Prompt tokens for a step while nobody reads along and so many of all prompts are left."""
        largest = self._largest()
        if self._stages == 1:
            return largest
        if not self._alone.fixed_s or not self._token_s:
            return max(CHUNK_TOKENS_MIN, min(largest, tokens_left // (4 * self._stages)))
        # Chunks of c on P stages take (left / c + P - 1) * (fixed + c * token): least where c is this.
        shortest = math.sqrt(tokens_left * self._alone.fixed_s / ((self._stages - 1) * self._token_s))
        return max(CHUNK_TOKENS_MIN, min(largest, math.ceil(shortest)))

    def _largest(self) -> int:
        if not self._alone.fixed_s or not self._token_s:
            return CHUNK_TOKENS_FIRST
        tokens = max(STEP_S - self._alone.fixed_s, self._alone.fixed_s * (1 / FIXED_SHARE - 1)) / self._token_s
        return max(CHUNK_TOKENS_MIN, min(int(tokens), STEP_TOKENS_MAX))


def _nearer(estimate: float | None, found: float) -> float:
    return found if estimate is None else estimate + LEARNT * (found - estimate)
