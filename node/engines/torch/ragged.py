"""One new token of each of several sequences attends to its own past, in place: what starts the kernels for that.

Owns the shapes: how far kernels pad, and into how many shares a past is cut, so that a single long one fills a card.
All of it follows from shapes alone, none from lengths, so that a recorded step stays right while sequences grow. The
kernels themselves (`ragged_kernels`) are handed in, because Triton is not installed everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from node.engines.torch.scoring import Scoring

PLACE_FIELDS: Final = 4
"""Of each row in each layer: addresses of keys and of values, room for positions, the first position."""

_SHARE_TOKENS: Final = 256
"""Fewer positions are not worth a share of their own."""

_SHARES_MAX: Final = 64
_GROUP_MIN: Final = 16
"""Rows of the smallest product that a GPU's matrix units know."""

_TILE_BYTES: Final = 16 * 1024
"""Of keys, and as much of values, that a kernel holds at a time."""


_STAGES: Final = 2
"""Such tiles under way at once: with more, cards for homes have too little memory beside their units."""


class Attend(Protocol):
    """Attention of one new token a row, which writes its key and value first."""

    def __call__(
        self,
        query: torch.Tensor,  # [heads, rows, key size]
        key: torch.Tensor,  # [kv heads, rows, key size]
        value: torch.Tensor,  # [kv heads, rows, value size]
        places: torch.Tensor,  # int64 [rows, PLACE_FIELDS]; all 0 for a row for nobody
        positions: torch.Tensor,  # int64 [rows]
        scoring: Scoring,
        reach: int,  # positions that any row may have to look at
    ) -> torch.Tensor:  # [rows, heads, value size]
        ...


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The first rows of a step, where each is one token. Tensors are read when it is computed, or computed again."""

    attend: Attend
    places: torch.Tensor  # int64 [rows, layers, PLACE_FIELDS]
    positions: torch.Tensor  # int64 [rows]
    context_tokens: int

    @property
    def count(self) -> int:
        return len(self.positions)

    def attended(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        reach = self.context_tokens if scoring.window is None else min(scoring.window, self.context_tokens)
        return self.attend(query, key, value, self.places[:, layer], self.positions, scoring, reach)


class Ragged:
    """`Attend` by the kernels, which come as a module. `programs`: how many of them keep the card busy."""

    def __init__(self, kernels: Any, programs: int) -> None:
        self._kernels = kernels
        self._programs = programs

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        places: torch.Tensor,
        positions: torch.Tensor,
        scoring: Scoring,
        reach: int,
    ) -> torch.Tensor:
        """See `Attend`."""
        query, key, value = _with_dense_ends(query), _with_dense_ends(key), _with_dense_ends(value)
        (heads, rows, key_size), (kv_heads, _, value_size) = query.shape, value.shape
        group, shares = heads // kv_heads, self._shares(rows * kv_heads, reach)
        key_pad, value_pad = _power_of_two(key_size), _power_of_two(value_size)
        sums = torch.empty((rows, heads, shares, value_size), dtype=torch.float32, device=query.device)
        totals = torch.empty((rows, heads, shares, 2), dtype=torch.float32, device=query.device)
        output = torch.empty((rows, heads, value_size), dtype=query.dtype, device=query.device)
        self._kernels.write[(rows, kv_heads)](
            key,
            value,
            places,
            positions,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            places.stride(0),
            key_size=key_size,
            key_pad=key_pad,
            value_size=value_size,
            value_pad=value_pad,
        )
        self._kernels.attend_share[(rows, kv_heads, shares)](
            query,
            places,
            positions,
            sums,
            totals,
            key_size**-0.5 if scoring.scaling is None else float(scoring.scaling),
            1.0 if scoring.softcap is None else float(scoring.softcap),
            query.stride(0),
            query.stride(1),
            places.stride(0),
            group=group,
            group_pad=max(_GROUP_MIN, _power_of_two(group)),
            key_size=key_size,
            key_pad=key_pad,
            value_size=value_size,
            value_pad=value_pad,
            window=scoring.window or 0,
            capped=scoring.softcap is not None,
            shares=shares,
            block=block_of(max(key_pad, value_pad), query.dtype),
            num_stages=_STAGES,
        )
        self._kernels.merge_shares[(rows, heads)](
            sums, totals, scoring.sinks, output, value_size=value_size, value_pad=value_pad, shares=shares
        )
        return output

    def _shares(self, pasts: int, reach: int) -> int:
        """A power of two: enough to keep the card busy, none of them tiny."""
        wanted = max(1, min(self._programs // pasts, reach // _SHARE_TOKENS, _SHARES_MAX))
        return 1 << (wanted.bit_length() - 1)


def block_of(pad: int, dtype: torch.dtype) -> int:
    """Positions that a kernel looks at at a time."""
    return max(16, min(64, _TILE_BYTES // (pad * dtype.itemsize)))


def _power_of_two(size: int) -> int:
    """The next one, and 16 at least: what products can be made of."""
    return max(16, 1 << (size - 1).bit_length())


def _with_dense_ends(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
