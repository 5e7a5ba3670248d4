"""Reads an untrusted msgpack array field by field, with a range for each.

A header is an array, not a map: it is shorter, and its order is the contract.
"""

from __future__ import annotations

import math
from array import array
from typing import Literal

from cluster.errors import WireError


class Fields:
    """A cursor over one array. Every reader checks type and range, and names what was wrong."""

    def __init__(self, values: object, what: str) -> None:
        if not isinstance(values, list):
            raise WireError(f"{what}: expected an array, found {type(values).__name__}")
        self._values: list[object] = values
        self._what = what
        self._next = 0

    def __len__(self) -> int:
        return len(self._values)

    def _take(self) -> object:
        if self._next >= len(self._values):
            raise WireError(f"{self._what}: ends after {len(self._values)} fields")
        self._next += 1
        return self._values[self._next - 1]

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high)."""
        value = self._take()
        if type(value) is not int or not low <= value < high:
            raise WireError(f"{self._what}: expected an integer in [{low}, {high}), found {value!r:.60}")
        return value

    def number(self, low: float, high: float) -> float:
        """A finite number in [low, high]."""
        value = self._take()
        if type(value) not in (int, float) or not isinstance(value, int | float):
            raise WireError(f"{self._what}: expected a number, found {value!r:.60}")
        if not math.isfinite(value) or not low <= value <= high:
            raise WireError(f"{self._what}: expected a number in [{low}, {high}], found {value!r:.60}")
        return float(value)

    def text(self, chars_max: int) -> str:
        value = self._take()
        if not isinstance(value, str) or len(value) > chars_max:
            raise WireError(f"{self._what}: expected text of at most {chars_max} characters, found {value!r:.60}")
        return value

    def data(self, bytes_max: int) -> bytes:
        value = self._take()
        if not isinstance(value, bytes) or len(value) > bytes_max:
            raise WireError(f"{self._what}: expected at most {bytes_max} bytes, found {type(value).__name__}")
        return value

    def integers(self, what: str, kind: Literal["i", "q"], count_max: int, low: int, high: int) -> array[int]:
        """Integers in [low, high) that travel as one piece of bytes, little-endian: 32 bits each for i, 64 for q. They
        are checked all at once."""
        value = self._take()
        values = array(kind)
        if not isinstance(value, bytes) or len(value) % values.itemsize:
            raise WireError(f"{self._what}.{what}: expected the bytes of integers, found {value!r:.60}")
        if len(value) > count_max * values.itemsize:
            raise WireError(f"{self._what}.{what}: expected an array of at most {count_max} items")
        values.frombytes(value)
        if values and not (low <= min(values) and max(values) < high):
            raise WireError(f"{self._what}.{what}: expected integers in [{low}, {high})")
        return values

    def items(self, what: str, count_max: int) -> list[object]:
        value = self._take()
        if not isinstance(value, list) or len(value) > count_max:
            raise WireError(f"{self._what}.{what}: expected an array of at most {count_max} items")
        return value

    def sub(self, what: str) -> Fields:
        return Fields(self._take(), f"{self._what}.{what}")

    def optional_sub(self, what: str) -> Fields | None:
        value = self._take()
        return None if value is None else Fields(value, f"{self._what}.{what}")

    def optional_text(self, chars_max: int) -> str | None:
        if self._next < len(self._values) and self._values[self._next] is None:
            self._next += 1
            return None
        return self.text(chars_max)
