"""Prompts of a wanted length that no cache has seen: random words from a seed.

How many tokens a word is, only the endpoint knows; two measurements tell.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_TEXT = (
    "apple river stone window garden market winter letter silver engine bridge forest candle planet butter ladder "
    "mirror pocket thunder village basket carpet dragon feather guitar hammer island jacket kitchen lantern mountain "
    "needle orange pencil quiet rabbit saddle table umbrella velvet wagon yellow zebra anchor bottle cotton desert "
    "eagle fabric glass harbor iron jungle kettle lemon meadow number ocean paper queen rocket summer tunnel uncle"
)
_WORDS = _TEXT.split()

SHORT_WORDS, LONG_WORDS = 40, 240
"""The two lengths that are measured to find out what a word and the template around a prompt cost."""


@dataclass(frozen=True, slots=True)
class TokenCost:
    """What a prompt costs in tokens: `fixed` for the template and `per_word` for each word."""

    fixed: float
    per_word: float

    @classmethod
    def from_counts(cls, short_tokens: int, long_tokens: int) -> TokenCost | None:
        """From the endpoint's own counts for the two lengths; None when it does not count."""
        per_word = (long_tokens - short_tokens) / (LONG_WORDS - SHORT_WORDS)
        return cls(short_tokens - per_word * SHORT_WORDS, per_word) if short_tokens > 0 and per_word > 0 else None

    def words_for(self, tokens: int) -> int:
        return max(1, round((tokens - self.fixed) / self.per_word))


UNKNOWN = TokenCost(fixed=10.0, per_word=1.2)
"""For an endpoint that does not count prompt tokens: about what English costs."""


def text_of(words: int, rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))
