"""The search for the best stages: which nodes, in which order, with which cuts.

Owns: the objective. With a given number of stages, the largest streamed bytes of a stage are as small as possible;
among equals, stages take even shares, on the nodes with the largest budgets. Exact over subsets, orders and cuts
for up to FREE_ORDER_MAX nodes.

The gaps, both deterministic: from more nodes than that, up to FREE_ORDER_MAX stages are searched exactly among the
nodes with the largest budgets, and more stages than that take the largest nodes in the order of their budgets,
with exact cuts. Where nodes share a host's memory an attempt may give up (see `cluster.placement.attempt`), so that
a plan may then be worse than the best, or missed; up to four nodes and a dozen cuts never reach that.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from cluster.placement.attempt import Assignment, Attempt
from cluster.placement.bounds import Bounds, FreeOrder, GivenOrder
from cluster.placement.costs import NEVER, CostTable, Matrix
from cluster.placement.pool import Candidate, Pool
from cluster.types import LayerRange, NodeId

FREE_ORDER_MAX: Final = 8


class StageSearch:
    """All numbers of stages, for one promise on one pool. `first`, when it gets a stage, gets stage 0; only where
    nothing else fits may it stand elsewhere."""

    def __init__(self, table: CostTable, pool: Pool, first: NodeId | None) -> None:
        self._table, self._pool, self._first = table, pool, first
        self._searches: dict[tuple[int, bool], _Search] = {}

    def best(self, count: int) -> list[tuple[Candidate, LayerRange]] | None:
        """The best `count` stages; None when none fit."""
        for leads in (True, False):
            search = self._search(count, leads)
            found = None if search is None else search.best(count)
            if search is not None and found is not None:
                return search.stages(found)
        return None

    def any(self, count: int) -> bool:
        """Whether `best` would find any: much less work where nodes share a host's memory."""
        search = self._search(count, False)
        return search is not None and search.any(count) is not None

    def _search(self, count: int, leads: bool) -> _Search | None:
        """The search that knows the answer; None when `count` stages are out of the question."""
        candidates = self._pool.candidates
        if not count <= min(len(candidates), self._table.groups) or not _has_room(self._table, self._pool, count):
            return None
        size = min(len(candidates), max(count, FREE_ORDER_MAX))
        leads = leads and any(candidate.node.id == self._first for candidate in candidates[:size])
        if (size, leads) not in self._searches:
            pool = self._pool if size == len(candidates) else self._pool.among(candidates[:size])
            # The node that has to come first also leads the order in which nodes are tried.
            ordered = sorted(pool.candidates, key=lambda each: each.node.id != self._first)
            self._searches[size, leads] = _Search(self._table, Pool(tuple(ordered), pool.shared_budgets), leads=leads)
        return self._searches[size, leads]


def _has_room(table: CostTable, pool: Pool, count: int) -> bool:
    """A quick no: the whole model is more than the largest `count` nodes hold."""
    room = sum(candidate.budget_bytes for candidate in pool.candidates[:count])
    whole = min(int(table.memory_on(candidate.node)[0, -1]) for candidate in pool.candidates)
    # Each stage rounds its cache's growth down by itself: at most a byte for each.
    return room + count >= whole + (count - 1) * table.stage_base_bytes


class _Search:
    """All numbers of stages on some candidates. With `leads`, the first of them can only hold stage 0."""

    def __init__(self, table: CostTable, pool: Pool, *, leads: bool) -> None:
        self._table, self._pool = table, pool
        self._fitting: list[Matrix] = []
        self._kinds: list[int] = []
        kinds: dict[object, int] = {}
        for index, candidate in enumerate(pool.candidates):
            is_leader = leads and index == 0
            kind = kinds.setdefault((candidate.kind, is_leader), len(kinds))
            if kind in self._kinds:
                matrix = self._fitting[self._kinds.index(kind)]
            else:
                matrix = np.where(table.memory_on(candidate.node) <= candidate.budget_bytes, table.streamed, NEVER)
                matrix[1:] = NEVER if is_leader else matrix[1:]
            self._fitting.append(matrix)
            self._kinds.append(kind)
        is_exact = len(pool.candidates) <= FREE_ORDER_MAX
        self._bounds: Bounds = FreeOrder(self._fitting, self._kinds) if is_exact else GivenOrder(self._fitting)

    def stages(self, assignment: Assignment) -> list[tuple[Candidate, LayerRange]]:
        """An assignment in terms of nodes and layers."""
        return [(self._pool.candidates[index], self._table.range_of(begin, end)) for index, begin, end in assignment]

    def best(self, count: int) -> Assignment | None:
        """The stages whose largest is smallest."""
        lowest = self._lowest(count)
        if lowest == NEVER:
            return None
        found = self._find(count, lowest)
        if found is not None or not self._pool.shared_budgets:
            return found
        # The bound knows nothing of shared memory. What fits grows with the limit, so bisect it.
        found = self.any(count)
        limits = np.unique(self._table.streamed[self._table.streamed > lowest])
        low, high = 0, len(limits[limits < NEVER]) - 2
        while found is not None and low <= high:
            middle = (low + high) // 2
            attempt = self._find(count, int(limits[middle]))
            if attempt is None:
                low = middle + 1
            else:
                found, high = attempt, middle - 1
        return found

    def any(self, count: int) -> Assignment | None:
        """Some stages, however uneven."""
        return None if self._lowest(count) == NEVER else self._find(count, NEVER - 1)

    def _lowest(self, count: int) -> int:
        """The smallest that the largest stage could be, were no host shared."""
        return int(self._bounds.rest(tuple(range(len(self._pool.candidates))), count)[0])

    def _find(self, count: int, limit: int) -> Assignment | None:
        return Attempt(self._table, self._pool, self._fitting, self._kinds, self._bounds, count, limit).find()
