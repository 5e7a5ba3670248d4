"""One attempt to place all layers in so many stages of at most so many streamed bytes.

Owns: the walk from the first layer to the last, and the memory that nodes share. The bounds already know which ends
lead somewhere, so where nothing is shared the walk never turns back. With them it may, and gives up after
VISITS_MAX stages tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from cluster.placement.bounds import Bounds
from cluster.placement.costs import CostTable, Matrix
from cluster.placement.pool import Area, Pool, together

VISITS_MAX: Final = 2_500

Assignment = list[tuple[int, int, int]]
"""For each stage: the candidate's index in the pool, and its range as indexes of cuts."""

Left = Mapping[Area, int]
"""Bytes that the shared areas still have."""


class Attempt:
    """Used once. `fitting` and `kinds` are as in FreeOrder."""

    def __init__(
        self,
        table: CostTable,
        pool: Pool,
        fitting: Sequence[Matrix],
        kinds: Sequence[int],
        bounds: Bounds,
        count: int,
        limit: int,
    ) -> None:
        self._table, self._candidates, self._shared_budgets = table, pool.candidates, pool.shared_budgets
        self._fitting, self._kinds, self._bounds = fitting, kinds, bounds
        self._memory = [table.memory_on(candidate.node) for candidate in pool.candidates]
        self._unused_at_end = len(pool.candidates) - count
        self._limit = limit
        self._visits = 0

    def find(self) -> Assignment | None:
        """The preferred stages: the first candidates, the most even shares."""
        return self._extend(0, tuple(range(len(self._candidates))), self._shared_budgets)

    def _extend(self, begin: int, unused: tuple[int, ...], left: Left) -> Assignment | None:
        """Place the layers from the cut `begin` on."""
        remaining = len(unused) - self._unused_at_end
        if remaining == 0:
            return []
        if left and self._is_hopeless(begin, unused, remaining, left):
            return None
        tried: set[tuple[int, tuple[Area, ...]]] = set()
        for choice in self._bounds.choices(unused):
            areas = self._candidates[choice].shared
            if (self._kinds[choice], areas) in tried:
                continue
            tried.add((self._kinds[choice], areas))
            others = tuple(index for index in unused if index != choice)
            for end in self._ends(begin, choice, others, remaining):
                left_after = left
                if areas:
                    taken = int(self._memory[choice][begin, end])
                    left_after = {**left, **{area: left[area] - taken for area in areas}}
                    if any(left_after[area] < 0 for area in areas):
                        continue
                found = self._extend(end, others, left_after)
                if found is not None:
                    return [(choice, begin, end), *found]
        return None

    def _ends(self, begin: int, choice: int, others: tuple[int, ...], remaining: int) -> list[int]:
        """Where the stage may end within the limit, so that the rest can too; the most even share first."""
        streamed = self._fitting[choice][begin]
        rest = self._bounds.rest(others, remaining - 1)
        ends = np.nonzero((streamed <= self._limit) & (rest <= self._limit))[0]
        share = int(self._table.streamed[begin, -1]) // remaining
        return sorted((int(end) for end in ends), key=lambda end: (abs(int(streamed[end]) - share), end))

    def _is_hopeless(self, begin: int, unused: tuple[int, ...], remaining: int, left: Left) -> bool:
        """Whether the memory that is left cannot hold the rest, by its sum; or whether it is time to give up."""
        self._visits += 1
        if self._visits > VISITS_MAX:
            return True
        need = min(int(self._memory[index][begin, -1]) for index in unused)
        # Each stage rounds its cache's growth down by itself: at most a byte for each.
        need += (remaining - 1) * self._table.stage_base_bytes - remaining
        return self._room(unused, remaining, left) < need

    def _room(self, unused: tuple[int, ...], remaining: int, left: Left) -> int:
        """What `remaining` stages can have at most."""
        candidates = [self._candidates[index] for index in unused]
        each = sorted(min([one.budget_bytes, *(left[area] for area in one.shared)]) for one in candidates)
        return min(together(candidates, left), sum(each[-remaining:]))
