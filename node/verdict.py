"""What came of a verification: each part beside the reference, and all of them chained. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isnan

from cluster.types import LayerRange
from node.fingerprint import Sketch
from node.hardware import Device


@dataclass(frozen=True, slots=True)
class Part:
    """Layers, the stage that they belong to, and what computes them."""

    stage: int
    layers: LayerRange
    device: Device


@dataclass(frozen=True, slots=True)
class Comparison:
    """A part beside the reference."""

    part: Part
    error: float
    tolerance: float

    @property
    def within(self) -> bool:
        return self.error <= self.tolerance  # never for NaN


@dataclass(frozen=True, slots=True)
class Chain:
    """The logits of all stages together beside the reference's, and the tokens that each would draw. Tokens may
    differ where the reference holds two of them level within the tolerance."""

    error: float
    tolerance: float
    expected_tokens: tuple[int, ...]
    found_tokens: tuple[int, ...]

    @property
    def within(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class NarrowChain:
    """The logits of all stages together, with a prompt's activations in eight bits between them, beside the
    reference's. Nothing is promised of them."""

    error: float
    expected_tokens: tuple[int, ...]
    found_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Everything that was compared."""

    stages: tuple[Comparison, ...]
    layers: tuple[Comparison, ...]
    chain: Chain
    sketches: tuple[Sketch, ...]  # of the layers
    narrow: NarrowChain | None = None  # where it was wanted

    @property
    def within(self) -> bool:
        return self.chain.within and all(comparison.within for comparison in (*self.stages, *self.layers))

    @property
    def worst_layer(self) -> Comparison:
        """The one farthest beyond its tolerance, or nearest to it."""
        return max(self.layers, key=lambda layer: inf if isnan(layer.error) else layer.error / layer.tolerance)
