"""Sizes as people write and read them: `8GiB`, `15%`, `2.3 MiB`."""

from __future__ import annotations

import re
from decimal import Decimal

from cluster.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": GIB * 1024, "tib": GIB * 1024, "tb": 1000**4,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size_bytes(text: str) -> int:
    """Turn `8GiB`, `512 MB` or `1048576` into bytes."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"expected a size such as 8GiB or 512MiB, found {text!r}")
    return int(Decimal(match[1]) * unit)


def parse_fraction(text: str) -> float:
    """Turn `15%` or `0.15` into 0.15."""
    stripped = text.strip()
    try:
        value = float(stripped[:-1]) / 100 if stripped.endswith("%") else float(stripped)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise UsageError(f"expected a share such as 15% (from 0% to below 100%), found {text!r}")
    return value


def format_bytes(count: float) -> str:
    """Turn bytes into `1.5 GiB`; three digits at most before the point."""
    for unit, size in (("TiB", GIB * 1024), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{int(count)} B"
