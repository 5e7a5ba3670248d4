"""Keys and values of several sequences, each in its own place, and what attention over them has to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from node.engines.torch import attention
from node.engines.torch.layer_kv import LayerKv
from node.engines.torch.ragged import PLACE_FIELDS, Ragged
from node.engines.torch.scoring import Scoring


@dataclass(frozen=True, slots=True)
class Case:
    """One step of one layer: each sequence's length with its new token; 0 is a row for nobody."""

    lengths: Sequence[int]
    heads: int = 4
    kv_heads: int = 2
    key_size: int = 64
    value_size: int = 64
    window: int | None = None
    scaling: float | None = None
    softcap: float | None = None
    has_sinks: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def reach(self) -> int:
        return max(*self.lengths, 1) if self.window is None else self.window


def distance(case: Case, ragged: Ragged, seed: int = 0) -> float:
    """How far `ragged` is from torch's attention, row by row in float32, at most: in terms of what it finds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype).to(case.device)

    rows = len(case.lengths)
    query = normal(case.heads, rows, case.key_size)
    key, value = normal(case.kv_heads, rows, case.key_size), normal(case.kv_heads, rows, case.value_size)
    scoring = Scoring(case.window, case.scaling, case.softcap, normal(case.heads) + 1 if case.has_sinks else None)
    caches, places, expected = [], [], []
    for row, length in enumerate(case.lengths):
        cache = LayerKv(case.window, 4096)
        caches.append(cache)  # stays where it is until the kernel has read it
        if length == 0:
            places.append((0,) * PLACE_FIELDS)
            expected.append(torch.zeros(case.heads, case.value_size))
            continue
        past = length - 1
        for begin in range(0, past, 37):  # grows, and forgets where there is a window
            new = min(37, past - begin)
            cache.write(begin, normal(case.kv_heads, new, case.key_size), normal(case.kv_heads, new, case.value_size))
            cache.settle(begin + new)
        # The new token is written twice: there, where the other one's must not be, and by the kernel.
        twin = cache.copy(past) if past else LayerKv(case.window, 4096)
        seen = twin.write(past, key[:, row : row + 1], value[:, row : row + 1])
        if not past:
            cache.write(0, key[:, row : row + 1] * torch.nan, value[:, row : row + 1] * torch.nan)
        cache.reserve(past, length + 1)  # a position more, for kernels that are wrong on purpose
        places.append(cache.place)
        keys, values, first = seen
        expected.append(_attended(query[:, row : row + 1], keys, values, past - first, scoring))
    positions = torch.tensor([max(0, length - 1) for length in case.lengths], device=case.device)
    found = ragged.attend(
        query, key, value, torch.tensor(places, device=case.device), positions, scoring, case.reach
    ).float()
    if not found.isfinite().all():
        return math.inf
    whole = torch.stack(expected).to(found.device)
    return float((found - whole).abs().max() / whole.abs().max().clamp(min=1e-6))


def _attended(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, scoring: Scoring
) -> torch.Tensor:
    """By the path that computes rows one by one, on a processor, in float32."""
    sinks = None if scoring.sinks is None else scoring.sinks.cpu().float()
    plain = Scoring(scoring.window, scoring.scaling, scoring.softcap, sinks)
    wide = (tensor.cpu().float() for tensor in (query, keys, values))
    return attention._attend_sequence(*wide, start, plain)[:, 0]
