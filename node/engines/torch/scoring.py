"""How a layer weighs the past, beside its being causal: what attention is told, whichever way it is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Scoring:
    """See above."""

    window: int | None  # positions that a query sees, its own among them
    scaling: float | None
    softcap: float | None = None  # scores are bent to stay between this and its negative
    sinks: torch.Tensor | None = None  # [heads]: the score of something that is attended to and has no value
