"""One attempt to place all layers in so many stages of at most so many streamed bytes.

Owns: the walk from the first layer to the last, and the memory that nodes share on a host. The bounds already know
which ends lead somewhere, so without shared hosts the walk never turns back. With them it may, and gives up after
VISITS_MAX stages tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from cluster.placement.bounds import Bounds
from cluster.placement.costs import CostTable, Matrix
from cluster.placement.pool import Pool
from cluster.types import HostId

VISITS_MAX: Final = 2_500

Assignment = list[tuple[int, int, int]]
"""For each stage: the candidate's index in the pool, and its range as indexes of cuts."""

Left = Mapping[HostId, int]
"""Bytes that the shared hosts still have."""


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
        self._table, self._candidates, self._host_budgets = table, pool.candidates, pool.host_budgets
        self._fitting, self._kinds, self._bounds = fitting, kinds, bounds
        self._memory = [table.memory(candidate.node.backend) for candidate in pool.candidates]
        self._unused_at_end = len(pool.candidates) - count
        self._limit = limit
        self._visits = 0

    def find(self) -> Assignment | None:
        """The preferred stages: the first candidates, the most even shares."""
        return self._extend(0, tuple(range(len(self._candidates))), self._host_budgets)

    def _extend(self, begin: int, unused: tuple[int, ...], left: Left) -> Assignment | None:
        """Place the layers from the cut `begin` on."""
        remaining = len(unused) - self._unused_at_end
        if remaining == 0:
            return []
        if left and self._is_hopeless(begin, unused, remaining, left):
            return None
        tried: set[tuple[int, HostId | None]] = set()
        for choice in self._bounds.choices(unused):
            host = self._candidates[choice].shared_host
            if (self._kinds[choice], host) in tried:
                continue
            tried.add((self._kinds[choice], host))
            others = tuple(index for index in unused if index != choice)
            for end in self._ends(begin, choice, others, remaining):
                left_after = left
                if host is not None:
                    left_after = {**left, host: left[host] - int(self._memory[choice][begin, end])}
                    if left_after[host] < 0:
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
        alone = 0
        on_host = dict.fromkeys(left, 0)
        each = []
        for index in unused:
            budget, host = self._candidates[index].budget_bytes, self._candidates[index].shared_host
            if host is None:
                alone += budget
            else:
                on_host[host] += budget
                budget = min(budget, left[host])
            each.append(budget)
        together = alone + sum(min(left[host], budgets) for host, budgets in on_host.items())
        return min(together, sum(sorted(each)[-remaining:]))
