"""Fingerprints of models on this machine's engines: what `potluck verify` saw, kept to be compared with next time.

Owns: the files, one for each model, engine version and hardware, and what has moved since. The oldest one of a
hardware is what later ones are held to, until a person accepts another. A file that cannot be read counts as none.
What a sketch is, is `node.fingerprint`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from cluster.errors import ModelError
from cluster.models.strict_json import read_object
from cluster.quantities import MIB
from cluster.state_dir import write_private
from cluster.types import Backend, LayerRange, ModelId
from node.comparison import Floats
from node.fingerprint import Sketch

_FORMAT: Final = 1
_BYTES_MAX: Final = 64 * MIB
"""One file: a layer takes about 12 KiB, and models have some hundred."""

_ELEMENTS_MAX: Final = 1 << 16
_FILES_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Maker:
    """What computed: the hardware, and the versions of what may be updated."""

    backend: Backend
    device: str
    hardware: str
    versions: str  # engine, library and driver


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What one maker made of a model's layers."""

    model: ModelId
    tokens: int
    maker: Maker
    sketches: Mapping[LayerRange, Sketch]
    accepted: int  # the largest counts among those of one hardware; 0 when it was only seen
    made: str  # a date, for people


class Fingerprints:
    """The folder of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.damaged: set[str] = set()  # files that could not be read, by name

    def of_hardware(self, model: ModelId, tokens: int, maker: Maker) -> list[Fingerprint]:
        """All of this model, input and hardware, whatever versions made them; what counts most comes first."""
        found = [print_ for path in self._paths() if (print_ := self._read(path)) is not None]
        same = [p for p in found if (p.model, p.tokens, _hardware(p.maker)) == (model, tokens, _hardware(maker))]
        return sorted(same, key=lambda p: (-p.accepted, p.made, p.maker.versions))

    def keep(self, new: Fingerprint, *, accept: bool) -> None:
        """Remember `new` beside what is known of its maker. What is known stays, unless `accept`."""
        known = self.of_hardware(new.model, new.tokens, new.maker)
        same = next((print_ for print_ in known if print_.maker == new.maker), None)
        newest = max((print_.accepted for print_ in known), default=0)
        kept = replace(new, accepted=newest + 1) if accept or not known else same or new
        if same is not None:
            older, newer = (same, new) if accept else (new, same)
            kept = replace(kept, sketches={**older.sketches, **newer.sketches})
        self._folder.mkdir(parents=True, exist_ok=True)
        write_private(self._folder / _file_name(kept), _to_json(kept))

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob("*.json"))[:_FILES_MAX] if self._folder.is_dir() else []

    def _read(self, path: Path) -> Fingerprint | None:
        try:
            return _parse(read_object(path, _BYTES_MAX))
        except (ModelError, KeyError, TypeError, ValueError):  # base64's own error is a ValueError
            self.damaged.add(path.name)
            return None


def fingerprint(model: ModelId, tokens: int, maker: Maker, sketches: Sequence[Sketch]) -> Fingerprint:
    """One that was made now."""
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return Fingerprint(model, tokens, maker, {sketch.layers: sketch for sketch in sketches}, 0, made)


def _hardware(maker: Maker) -> tuple[str, str, str]:
    return maker.backend.value, maker.device, maker.hardware


def _file_name(print_: Fingerprint) -> str:
    maker = print_.maker
    parts = (print_.model, print_.tokens, maker.backend.value, maker.device, maker.hardware, maker.versions)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32] + ".json"


def _to_json(print_: Fingerprint) -> bytes:
    maker = print_.maker
    document = {
        "format": _FORMAT,
        "model": print_.model,
        "tokens": print_.tokens,
        "backend": maker.backend.value,
        "device": maker.device,
        "hardware": maker.hardware,
        "versions": maker.versions,
        "accepted": print_.accepted,
        "made": print_.made,
        "layers": [
            {
                "first": sketch.layers.first,
                "last": sketch.layers.last,
                "input_rms": sketch.input_rms,
                "digest": sketch.digest,
                "shape": list(sketch.values.shape),
                "values": _packed(sketch.values),
                "scale": _packed(sketch.scale),
            }
            for sketch in sorted(print_.sketches.values(), key=lambda sketch: sketch.layers)
        ],
    }
    return json.dumps(document).encode()


def _parse(document: Mapping[str, object]) -> Fingerprint:
    """ValueError, TypeError or KeyError where this is not what `_to_json` writes."""
    if document["format"] != _FORMAT or not isinstance(layers := document["layers"], list):
        raise ValueError("another format")
    maker = Maker(
        Backend(_text(document, "backend")),
        _text(document, "device"),
        _text(document, "hardware"),
        _text(document, "versions"),
    )
    sketches = [_parse_sketch(layer) for layer in layers]
    return Fingerprint(
        ModelId(_text(document, "model")),
        _count(document, "tokens"),
        maker,
        {sketch.layers: sketch for sketch in sketches},
        _count(document, "accepted"),
        _text(document, "made"),
    )


def _parse_sketch(stored: Mapping[str, object]) -> Sketch:
    rows, columns = _counts(stored, "shape")
    if not 0 < rows * columns <= _ELEMENTS_MAX:
        raise ValueError("expected some numbers of each token")
    rms = stored["input_rms"]
    if not isinstance(rms, int | float):
        raise TypeError("expected a number")
    return Sketch(
        layers=LayerRange(_count(stored, "first"), _count(stored, "last")),
        input_rms=float(rms),
        digest=_text(stored, "digest"),
        values=_unpacked(_text(stored, "values"), rows * columns).reshape(rows, columns),
        scale=_unpacked(_text(stored, "scale"), rows),
    )


def _text(stored: Mapping[str, object], name: str) -> str:
    if not isinstance(value := stored[name], str):
        raise TypeError(name)
    return value


def _count(stored: Mapping[str, object], name: str) -> int:
    if type(value := stored[name]) is not int or value < 0:
        raise TypeError(name)
    return value


def _counts(stored: Mapping[str, object], name: str) -> list[int]:
    if not isinstance(value := stored[name], list) or any(type(item) is not int for item in value):
        raise TypeError(name)
    return value


def _packed(array: Floats) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode("ascii")


def _unpacked(text: str, count: int) -> Floats:
    array = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
    if array.size != count:
        raise ValueError(f"expected {count} numbers, found {array.size}")
    return array
