"""How well the rest of a model can be placed on the nodes that are left, whatever hosts they share.

Owns: two dynamic programmes over cuts. One is free to order the nodes (exact; its states are multisets of kinds),
the other keeps the order given (for pools too large to try all orders). Their answers guide the search, which
alone knows about hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cluster.placement.costs import NEVER, Matrix

Vector = npt.NDArray[np.int64]
"""For each cut: the smallest possible largest stage of [cut, end), in streamed bytes; NEVER where none fits."""


class Bounds(Protocol):
    """Candidates are indexes; the ones still unused come as an ascending tuple."""

    def choices(self, unused: tuple[int, ...]) -> tuple[int, ...]:
        """Who may hold the next stage."""
        ...

    def rest(self, unused: tuple[int, ...], count: int) -> Vector:
        """What `count` stages on some of `unused` can make of the layers from each cut on."""
        ...


def _end(cuts: int) -> Vector:
    """Nothing is left exactly at the last cut."""
    vector = np.full(cuts, NEVER, dtype=np.int64)
    vector[-1] = 0
    return vector


def _before(fitting: Matrix, rest: Vector) -> Vector:
    """One more stage in front of `rest`."""
    best: Vector = np.maximum(fitting, rest[None, :]).min(axis=1)
    return best


class FreeOrder:
    """Any order. `fitting[i]` holds the streamed bytes of the ranges that fit candidate i, NEVER elsewhere;
    candidates of one kind have the same matrix and are interchangeable here."""

    def __init__(self, fitting: Sequence[Matrix], kinds: Sequence[int]) -> None:
        self._kinds = kinds
        self._kind_count = max(kinds) + 1
        self._fitting = {kind: matrix for matrix, kind in zip(fitting, kinds, strict=True)}
        self._exactly: dict[tuple[int, ...], Vector] = {(0,) * self._kind_count: _end(len(fitting[0]))}
        self._best: dict[tuple[tuple[int, ...], int], Vector] = {}

    def choices(self, unused: tuple[int, ...]) -> tuple[int, ...]:
        return unused

    def rest(self, unused: tuple[int, ...], count: int) -> Vector:
        counts = [0] * self._kind_count
        for candidate in unused:
            counts[self._kinds[candidate]] += 1
        key = (tuple(counts), count)
        if key not in self._best:
            options = [self._using(some) for some in _multisets(tuple(counts), count)]
            self._best[key] = np.minimum.reduce(options)
        return self._best[key]

    def _using(self, counts: tuple[int, ...]) -> Vector:
        """The best with exactly so many nodes of each kind."""
        if counts not in self._exactly:
            options = [
                _before(self._fitting[kind], self._using((*counts[:kind], count - 1, *counts[kind + 1 :])))
                for kind, count in enumerate(counts)
                if count > 0
            ]
            self._exactly[counts] = np.minimum.reduce(options)
        return self._exactly[counts]


class GivenOrder:
    """The candidates in their order, all of them."""

    def __init__(self, fitting: Sequence[Matrix]) -> None:
        self._rest = [_end(len(fitting[0]))]  # by the number of candidates left
        for matrix in reversed(fitting):
            self._rest.append(_before(matrix, self._rest[-1]))

    def choices(self, unused: tuple[int, ...]) -> tuple[int, ...]:
        return unused[:1]

    def rest(self, unused: tuple[int, ...], count: int) -> Vector:
        assert len(unused) == count
        return self._rest[count]


@lru_cache(maxsize=4096)
def _multisets(available: tuple[int, ...], size: int) -> tuple[tuple[int, ...], ...]:
    """All ways to take `size` of `available` (so many of each kind)."""
    if not available:
        return ((),) if size == 0 else ()
    return tuple(
        (count, *others)
        for count in range(max(0, size - sum(available[1:])), min(size, available[0]) + 1)
        for others in _multisets(available[1:], size - count)
    )
