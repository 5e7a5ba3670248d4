"""Which node holds which layers: pure, deterministic, by memory.

`place` gives a plan or raises DoesNotFit with what is missing and what would fit instead. No clock, no socket, no
random number: the same nodes give the same plan in whatever order they are listed.
"""

from cluster.placement.ask import Ask
from cluster.placement.costs import StageCost, sequences_max, stage_cost
from cluster.placement.explain import RoughFit, StageRow, describe, rough_fits
from cluster.placement.planner import place

__all__ = ["Ask", "RoughFit", "StageCost", "StageRow", "describe", "place", "rough_fits", "sequences_max", "stage_cost"]
