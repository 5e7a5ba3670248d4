"""How much of the cache a sequence is promised when nobody says how long its answer will be.

Learnt from the answers that ended lately. A promise may turn out too small; then `admission` finds more room.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from coordinator.sequence import SequenceState

ANSWERS_KEPT: Final = 64
"""Enough for a steady quantile, few enough to follow what people ask."""

ANSWERS_BELIEVED: Final = 8
"""Fewer say nothing yet."""

ANSWER_TOKENS_FIRST: Final = 512
"""Until then: a page of text, where most chat answers end."""

QUANTILE: Final = 0.8
"""Four of five answers stay within their promise; the fifth may have to wait for room, or start again."""


class Promises:
    """The lengths of answers that could have gone on until the context was full."""

    def __init__(self, first_tokens: int = ANSWER_TOKENS_FIRST) -> None:
        self._first_tokens = first_tokens
        self._lengths: deque[int] = deque(maxlen=ANSWERS_KEPT)

    def note(self, state: SequenceState) -> None:
        """It has ended well."""
        if state.ask.open_ended:
            self._lengths.append(state.generated)

    @property
    def answer_tokens(self) -> int:
        if len(self._lengths) < ANSWERS_BELIEVED:
            return self._first_tokens
        return sorted(self._lengths)[int(QUANTILE * len(self._lengths))]

    def tokens_for(self, state: SequenceState) -> int:
        """Cache positions to promise. Who had to give room back has grown beyond what was expected, so as much again
        as it has drawn is expected to follow."""
        worst = state.ask.worst_case_tokens
        if not state.ask.open_ended:
            return worst
        return min(worst, len(state.tokens) + max(1, self.answer_tokens - state.generated, state.generated))
