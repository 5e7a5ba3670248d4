"""Reads a JSON object field by field; whatever nobody has read by the end is refused by name.

So nothing that a client sends is ever ignored: a field is understood, or has a value that asks for nothing, or is an
error. A null counts as absent. Knows types and ranges, not what the fields mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NoReturn

from cluster.errors import RequestError

SHOWN_CHARS_MAX = 40
"""Of a wrong value in an error message: enough to recognise it, not enough to repeat a prompt."""


class Fields:
    """One JSON object. `path` is how a client would write its place, such as messages[0]."""

    def __init__(self, value: object, path: str = "") -> None:
        self._path = path
        if not isinstance(value, dict):
            raise RequestError(f"{path or 'the body'} must be a JSON object, found {shown(value)}", field=path or None)
        self._left: dict[str, object] = {name: item for name, item in value.items() if item is not None}

    def name(self, field: str) -> str:
        return f"{self._path}.{field}" if self._path else field

    def fail(self, field: str, expected: str, found: object) -> NoReturn:
        name = self.name(field)
        raise RequestError(f"{name} must be {expected}, found {shown(found)}", field=name, code="invalid_value")

    def take(self, field: str) -> object | None:
        """The raw value; from here on the field counts as read."""
        return self._left.pop(field, None)

    def text(self, field: str) -> str | None:
        value = self.take(field)
        return None if value is None else checked_text(value, self.name(field))

    def one_of(self, field: str, allowed: Collection[str]) -> str | None:
        value = self.text(field)
        if value is not None and value not in allowed:
            self.fail(field, "one of " + ", ".join(allowed), value)
        return value

    def flag(self, field: str, default: bool = False) -> bool:
        value = self.take(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(field, "true or false", value)
        return value

    def integer(self, field: str, low: int, high: int) -> int | None:
        value = self.take(field)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():  # some languages write 1 as 1.0
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(field, f"an integer from {low} to {high}", value)
        return value

    def number(self, field: str, low: float, high: float, *, above: bool = False) -> float | None:
        """A number in [low, high], or in (low, high] when `above`."""
        value = self.take(field)
        if value is None:
            return None
        expected = f"a number above {low:g}, at most {high:g}" if above else f"a number from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(field, expected, value)
        if not low <= value <= high or (above and value == low):  # false for infinities as well
            self.fail(field, expected, value)
        return float(value)

    def objects(self, field: str) -> list[object] | None:
        """A list of anything; its items are the caller's to check."""
        value = self.take(field)
        if value is not None and not isinstance(value, list):
            self.fail(field, "a list", value)
        return value

    def neutral(self, accepted: Mapping[str, Collection[object]]) -> None:
        """Fields that are not supported, with the values under which they ask for nothing."""
        for field, values in accepted.items():
            found = self._left.get(field)
            if any(_same(found, value) for value in values):
                del self._left[field]

    def finish(self) -> None:
        """Refuse what nobody has read."""
        for field in self._left:
            name = self.name(field)
            raise RequestError(f"{name} is not supported by this server", field=name, code="unsupported_parameter")


def checked_text(value: object, name: str) -> str:
    """A string that is real text: JSON can write half a character as an escape, which no encoding holds."""
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string, found {shown(value)}", field=name, code="invalid_value")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"{name} holds half of a surrogate pair", field=name, code="invalid_value") from None
    return value


def shown(value: object) -> str:
    """A wrong value, cut short, as a message shows it."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARS_MAX else text[:SHOWN_CHARS_MAX] + "..."


def _same(one: object, other: object) -> bool:
    """Equality that tells 0 from false, as JSON does."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
