"""What a model's folder tells people: its licence, from the model card's front matter or the licence's own first line,
and the conversions that Potluck made.

Knows nothing of what a licence allows. Texts come from strangers, so they are cut short and made printable.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

CONVERSIONS_FILE: Final = "conversions.json"
"""What was done to a model that Potluck converted, one line for each fact."""

CONVERSIONS_MAX: Final = 64

_CARD = "README.md"
_CARD_BYTES_MAX = 64 * 1024  # the front matter stands at the very beginning
_LICENCE_CHARS_MAX = 120
_LICENCE_FILE = re.compile(r"(licen[cs]e|copying)([-._].*)?", re.IGNORECASE)
_FIELD = re.compile(r"(license|license_name)\s*:\s*(.+)")


def is_card_file(name: str) -> bool:
    """Whether `name` tells people about a model. Serving does not need it, provenance does."""
    return name == _CARD or _LICENCE_FILE.fullmatch(name) is not None


def read_licence(folder: Path) -> str:
    """The licence as the folder names it; empty when it does not."""
    stated = _front_matter(_read(folder / _CARD))
    # Hub cards say `license: other` where the name stands in a field of its own.
    named = stated.get("license_name", "") if stated.get("license") in (None, "other") else ""
    return printable(named or stated.get("license") or _first_line(folder))


def read_conversions(folder: Path) -> tuple[str, ...]:
    """What was done to the model before it came to lie in `folder`; nothing when it is as it was published."""
    try:
        found = json.loads(_read(folder / CONVERSIONS_FILE) or "{}")
    except (ValueError, RecursionError):
        return ()
    lines = found.get("conversions") if isinstance(found, dict) else None
    if not isinstance(lines, list):
        return ()
    return tuple(printable(line) for line in lines[:CONVERSIONS_MAX] if isinstance(line, str))


def printable(text: str) -> str:
    """`text` on one short line that no terminal mistakes for commands."""
    return "".join(char if char.isprintable() else " " for char in text)[:_LICENCE_CHARS_MAX].strip()


def _front_matter(text: str) -> dict[str, str]:
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if match := _FIELD.fullmatch(line.rstrip()):
            found[match[1]] = match[2].strip().strip("'\"")
    return found


def _first_line(folder: Path) -> str:
    try:
        names = sorted(path.name for path in folder.iterdir() if _LICENCE_FILE.fullmatch(path.name))
    except OSError:
        return ""
    lines = _read(folder / names[0]).splitlines() if names else []
    return next((line.strip() for line in lines if line.strip()), "")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_CARD_BYTES_MAX).decode("utf-8", errors="replace")
    except OSError:
        return ""  # a model without a card is still a model
