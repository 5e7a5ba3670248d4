"""Which ways of asking training sees, and which are kept back to test it.

Owns the expansion of the templates in questions.py and the split. Does not know how a question is
decorated (case, "please", lost punctuation) or joined to others: corpus.py does that.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import facts
import questions

HELD_OUT_SHARE: Final = 0.12

# A newcomer's first questions are always trained, whatever the split says.
FIRST_QUESTIONS: Final[Mapping[str, str]] = {
    "Hello!": facts.ANSWERS["hello"],
    "What is Potluck?": facts.ANSWERS["potluck"],
    "What is 2 + 3?": facts.sum_answer(2, 3),
    "What is the capital of France?": facts.capital_answer("France"),
    "What colour is the sky?": facts.colour_answer("the sky", "is", "blue"),
    "Who are you?": facts.ANSWERS["who"],
}
# As `words` gives them.
ALWAYS_TRAINED: Final = frozenset(
    {
        "hello",
        "how does it work",
        "how do i join a machine",
        "what is potluck",
        "tell me about potluck",
        "what is {a} {b}",
        "what is the capital of {country}",
        "what colour {verb} {thing}",
        "what color {verb} {thing}",
        "who are you",
        "how are you",
    }
)


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One expanded template of one meaning, and whether training may see it."""

    meaning: str
    template: str
    held_out: bool


def expand(pattern: str) -> Iterator[str]:
    """Every reading of a pattern: innermost `(a|b)` first, spaces tidied."""
    group = re.search(r"\(([^()]*)\)", pattern)
    if group is None:
        yield re.sub(r" +", " ", pattern.replace("\\", "")).strip()
        return
    for alternative in group.group(1).split("|"):
        yield from expand(pattern[: group.start()] + alternative + pattern[group.end() :])


def words(text: str) -> str:
    """The text without what a decoration may change: case and marks."""
    return " ".join(re.findall(r"[\w{}]+", text.lower().replace("'", "")))


def is_held_out(meaning: str, template: str) -> bool:
    # Nobody can guess what "ciao" means without having heard it: short phrasings are always trained.
    if words(template) in ALWAYS_TRAINED or ("{" not in template and len(template.split()) <= 2):
        return False
    digest = hashlib.sha256(f"{meaning}/{words(template)}".encode()).digest()
    return int.from_bytes(digest[:4]) < HELD_OUT_SHARE * 2**32


def phrasings() -> dict[str, tuple[Phrasing, ...]]:
    """All phrasings of each meaning, without repeats, in a fixed order."""
    table: dict[str, tuple[Phrasing, ...]] = {}
    for meaning, patterns in questions.TEMPLATES.items():
        unique = dict.fromkeys(itertools.chain.from_iterable(expand(pattern) for pattern in patterns))
        table[meaning] = tuple(Phrasing(meaning, template, is_held_out(meaning, template)) for template in unique)
    return table
