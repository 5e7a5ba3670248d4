"""What has moved on this machine since a model was verified before: each layer beside what it made of the same input.

Owns: who made what (engine, versions, hardware), which earlier fingerprint counts, and when a layer has moved by more
than rounding. Keeping them is `cluster.cli.fingerprints`, showing `cluster.cli.verify_report`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isnan

from cluster.cli.fingerprints import Fingerprint, Fingerprints, Maker, fingerprint
from cluster.types import LayerRange, ModelId
from node.comparison import summary, tolerance
from node.fingerprint import Sketch
from node.hardware import Device, engine_version
from node.memory_cuda import read_driver
from node.verdict import Verdict
from node.verification import Subject


@dataclass(frozen=True, slots=True)
class Moved:
    """A layer (or an uncuttable group) beside its earlier self."""

    layers: LayerRange
    by: float | None  # None where nothing earlier can be compared with
    allowed: float  # what another order of the same operations may cause
    identical: bool
    since: Fingerprint | None

    @property
    def beyond(self) -> bool:
        """Moved by more than rounding; NaN is."""
        return self.by is not None and not self.identical and not self.by <= self.allowed


@dataclass(frozen=True, slots=True)
class Drift:
    """Everything that one engine and device computed, beside what it computed before."""

    maker: Maker
    layers: tuple[Moved, ...]

    @property
    def beyond(self) -> tuple[Moved, ...]:
        return tuple(layer for layer in self.layers if layer.beyond)

    @property
    def compared(self) -> tuple[Moved, ...]:
        return tuple(layer for layer in self.layers if layer.by is not None)

    @property
    def worst(self) -> Moved | None:
        """The layer that moved farthest beyond, or nearest to, what is allowed."""
        moved = [layer for layer in self.compared if not layer.identical]
        return max(moved, key=lambda layer: _distance(layer.by, layer.allowed)) if moved else None


def maker_of(device: Device) -> Maker:
    """The hardware, and the versions of what is between it and the model."""
    hardware = device.name if device.device != "cpu" else f"{device.name}, {os.cpu_count()} threads"
    versions = ", ".join(filter(None, (engine_version(device.backend), _driver(device))))
    return Maker(device.backend, device.device, hardware, versions)


def compare(
    subject: Subject,
    verdict: Verdict,
    model: ModelId,
    tokens: int,
    store: Fingerprints,
    made_by: Callable[[Device], Maker] = maker_of,
) -> tuple[Drift, ...]:
    """What has moved on each device that computed."""
    drifts = []
    for device, sketches in _by_device(subject, verdict).items():
        maker = made_by(device)
        earlier = store.of_hardware(model, tokens, maker)
        drifts.append(Drift(maker, tuple(_moved(sketch, earlier, subject) for sketch in sketches)))
    return tuple(drifts)


def keep(
    subject: Subject,
    verdict: Verdict,
    model: ModelId,
    tokens: int,
    store: Fingerprints,
    *,
    accept: bool,
    made_by: Callable[[Device], Maker] = maker_of,
) -> None:
    """Remember what every device made."""
    for device, sketches in _by_device(subject, verdict).items():
        store.keep(fingerprint(model, tokens, made_by(device), sketches), accept=accept)


def _by_device(subject: Subject, verdict: Verdict) -> dict[Device, list[Sketch]]:
    found: dict[Device, list[Sketch]] = {}
    for part, sketch in zip(subject.layers, verdict.sketches, strict=True):
        found.setdefault(part.device, []).append(sketch)
    return found


def _moved(sketch: Sketch, earlier: Sequence[Fingerprint], subject: Subject) -> Moved:
    dtype, routed = subject.facts.dtype, subject.routed
    allowed = tolerance(dtype, len(sketch.layers), same=True, routed=routed)
    for since in earlier:
        before = since.sketches.get(sketch.layers)
        errors = None if before is None else sketch.moved(before)
        if before is not None and errors is not None:
            by = summary(errors, dtype, routed=routed)
            return Moved(sketch.layers, by, allowed, sketch.digest == before.digest, since)
    return Moved(sketch.layers, None, allowed, False, None)


def _distance(by: float | None, allowed: float) -> float:
    return inf if by is None or isnan(by) else by / allowed


def _driver(device: Device) -> str:
    if device.device.startswith("cuda"):
        version = read_driver().version
        return f"driver {version}" if version else ""
    # Metal's kernels come with the system, and are compiled by it.
    return f"macOS {platform.mac_ver()[0]}" if device.device in ("metal", "mps") else ""
