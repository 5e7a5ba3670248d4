"""What layers make of an input that is always the same, as little of it as tells two runs apart.

A library or driver that is updated may compute otherwise without being wrong by the reference's tolerance, and the
reference is computed by a library too. So each layer also gets an input that no library made, and what leaves is
remembered: a hash of every bit, and some of the numbers, which say by how much it moved. Pure; keeping sketches is
`cluster.cli.fingerprints`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log2

import numpy as np

from cluster.steps import Boundary
from cluster.types import LayerRange
from node.comparison import Floats, from_host
from node.engine import Logits

SAMPLES = 256
"""Numbers kept of each token: everything that an attention head or an MLP does reaches all elements of what leaves."""

TOKENS = 8
"""Tokens kept, the last ones: they have seen all others."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """What some layers made of the steady input."""

    layers: LayerRange
    input_rms: float  # of what entered; 0 where token ids did
    digest: str  # of every number that left
    values: Floats  # [tokens, samples] of what left
    scale: Floats  # [tokens]: the rms of all that left

    def moved(self, before: Sketch) -> Floats | None:
        """For each token by how much the numbers differ, in the measure of `node.comparison`; None where the two
        cannot be compared, because something else entered or was kept."""
        if self.layers != before.layers or self.input_rms != before.input_rms:
            return None
        if self.values.shape != before.values.shape:
            return None
        scale = np.maximum(np.maximum(np.abs(before.values), before.scale[:, None]), np.finfo(np.float32).tiny)
        return np.asarray((np.abs(self.values - before.values) / scale).max(axis=-1), dtype=np.float32)


def steady_rms(hidden: Floats) -> float:
    """How large the steady input has to be so that layers treat it like `hidden`: a power of two, which a rounding
    of the reference does not change."""
    rms = float(np.sqrt(np.mean(np.square(hidden, dtype=np.float64))))
    return float(2.0 ** round(log2(rms))) if rms > 0 and isfinite(rms) else 1.0


def steady_input(layer: int, tokens: int, width: int, rms: float) -> Floats:
    """What enters `layer` each time, [tokens, width]."""
    return (np.random.default_rng(layer).standard_normal((tokens, width), np.float32) * np.float32(rms)).astype(
        np.float32
    )


def sketch_of(layers: LayerRange, input_rms: float, leaving: Sequence[Boundary | Logits]) -> Sketch:
    """The sketch of what left after each piece of the input."""
    if isinstance(leaving[-1], np.ndarray):
        left = np.concatenate([logits for logits in leaving if isinstance(logits, np.ndarray)])
    else:
        left = np.concatenate([from_host(output[0]) for output in leaving if isinstance(output, tuple)])
    last = left[-TOKENS:]
    columns = np.random.default_rng(left.shape[1]).permutation(left.shape[1])[:SAMPLES]
    return Sketch(
        layers=layers,
        input_rms=input_rms,
        digest=hashlib.sha256(np.ascontiguousarray(left).tobytes()).hexdigest(),
        values=np.ascontiguousarray(last[:, np.sort(columns)]),
        scale=np.sqrt(np.mean(np.square(last), axis=-1)),
    )
