"""Finds stop strings in a stream of text without ever letting go of half of one.

The result does not depend on how the text was cut into pieces: the first stop string to be complete ends the text,
and of several that complete with the same character the longest does.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """One choice's stop strings. Each advances by Knuth, Morris and Pratt, so a character costs O(1) per string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple((stop, _borders(stop)) for stop in stops)
        self._matched = [0] * len(self._stops)  # how much of each stop string the text so far ends with
        self._held = ""  # text that may turn out to begin a stop string

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; returns what may be shown, and whether a stop string is complete (take no more then)."""
        if not self._stops:
            return text, False
        for at, character in enumerate(text):
            found = self._advance(character)
            if found:
                seen = self._held + text[: at + 1]
                self._held = ""
                return seen[: len(seen) - found], True
        seen = self._held + text
        safe = len(seen) - max(self._matched)
        self._held = seen[safe:]
        return seen[:safe], False

    def flush(self) -> str:
        """The text has ended otherwise: what was held back is no stop string."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> int:
        """Move every stop string on by one character; returns the length of the longest that is now complete."""
        found = 0
        for index, (stop, borders) in enumerate(self._stops):
            length = self._matched[index]
            while length and stop[length] != character:
                length = borders[length]
            if stop[length] == character:
                length += 1
            self._matched[index] = length
            if length == len(stop):
                found = max(found, length)
        return found


def _borders(text: str) -> list[int]:
    """For each prefix length, the longest proper prefix of it that is also its suffix."""
    borders = [0] * (len(text) + 1)
    length = 0
    for end in range(1, len(text)):
        while length and text[end] != text[length]:
            length = borders[length]
        if text[end] == text[length]:
            length += 1
        borders[end + 1] = length
    return borders
