"""JSON objects from files that nobody vouches for.

Owns: turning bytes into an object or a ModelError. Knows nothing of what the object means.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from cluster.errors import ModelError
from cluster.quantities import format_bytes


def parse_object(data: bytes, what: str) -> dict[str, object]:
    """Parse `data`, which error messages call `what`. Duplicate keys are refused: parsers disagree on which one
    counts, so two machines could read two different models from one file."""
    try:
        parsed: object = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{what}: expected UTF-8 text, found byte {data[error.start]:#04x} at {error.start}; download it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what}: expected JSON, found something else ({error}); download it again") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{what}: expected a JSON object, found {type(parsed).__name__}; download it again")
    return parsed


def read_object(path: Path, max_bytes: int) -> dict[str, object]:
    """Read a JSON file of at most `max_bytes`."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if len(data) > max_bytes:
        raise ModelError(f"{path}: expected at most {format_bytes(max_bytes)}, found more; is this the right file?")
    return parse_object(data, str(path))


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.80} appears twice")
    return found
