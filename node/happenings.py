"""What a node tells whoever watches its screen: that it is taken, at work, free again. Values only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.types import LayerRange


@dataclass(frozen=True, slots=True)
class Taken:
    """A coordinator leased the node."""

    coordinator: str  # the beginning of its id; the whole of it commands the node


@dataclass(frozen=True, slots=True)
class Preparing:
    """Weights of a stage are fetched and loaded."""

    layers: LayerRange
    layer_count: int


@dataclass(frozen=True, slots=True)
class AtWork:
    """The stage is loaded and may be asked at any time."""

    layers: LayerRange
    layer_count: int
    took_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The stage could not be prepared."""

    problem: str


@dataclass(frozen=True, slots=True)
class Free:
    """The node waits for a coordinator again."""

    reason: str


NodeHappening = Taken | Preparing | AtWork | Failed | Free

TellNode = Callable[[NodeHappening], None]
