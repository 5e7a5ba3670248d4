"""The CPU's own product with four-bit codes: its conditions, the order in which it takes codes, and the call.

torch's kernel computes `(code - 8) * scale + zero` with both in bfloat16; weights are never rounded to bfloat16, and
sums are float32. It has a code for other types too, which is slower than unpacking. Knows nothing of formats or models.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch

GROUPS: Final = frozenset({32, 64, 128, 256})
ROWS: Final = 16
"""The kernel's own conditions: columns of a group, and what the number of rows is a multiple of."""

ROWS_IN_ORDER: Final = 64
"""Rows in which the order of codes repeats, or a multiple of them, on every kind of processor."""

_X86: Final = frozenset({"x86_64", "amd64"})


def product(x: torch.Tensor, codes: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    """bfloat16 [tokens, rows] of bfloat16 [tokens, columns], bytes [rows, columns / 2] in the kernel's order, and
    bfloat16 [groups, rows, 2]: scales and zeros."""
    group = x.shape[1] // scaling.shape[0]
    found: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scaling)
    return found


def in_order(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [rows, columns / 2] of codes [rows, columns]. Each `ROWS_IN_ORDER` rows keep to themselves."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed


@lru_cache
def is_usable() -> bool:
    """Whether the kernel rounds its sums, and is faster than unpacking. On aarch64 torch's source cuts lower bits off,
    which makes every product smaller; on x86 without AVX2 it is a plain loop, slower than unpacking even at one row.
    Tried on sums that round up, in whole blocks of rows and a part of one."""
    if platform.machine().lower() in _X86 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return False
    x, scaling = torch.zeros((5, 32), dtype=torch.bfloat16), torch.zeros((1, 80, 2), dtype=torch.bfloat16)
    x[:, 0], x[:, 1], scaling[..., 0] = 1.0, 0.75 * 2**-7, 1.0
    try:
        codes = in_order(torch.full((80, 32), 9))
        return bool((product(x, codes, scaling) == 1 + 2**-7).all())
    except (AttributeError, RuntimeError):  # as builds of torch without the kernel say it
        return False


@dataclass(frozen=True, slots=True)
class Order:
    """Where the codes of a block of `2 * stride` rows lie: those of a column in `stride` bytes, column by column."""

    stride: int
    offsets: Sequence[int]  # of the byte that holds a row's code
    shifts: Sequence[int]  # of the code in its byte

    @property
    def rows(self) -> torch.Tensor | None:
        """Which row of a block is where: those in the lower halves of the bytes, then those in the upper ones. None
        where that is their own order."""
        places = torch.tensor(self.offsets) + self.stride * (torch.tensor(self.shifts) // 4)
        return None if torch.equal(places, torch.arange(2 * self.stride)) else places.argsort()


@lru_cache
def order_of_codes() -> Order | None:
    """Found out by trying, since it differs between processors; None when it is of another kind altogether."""
    offsets, shifts, strides = [], [], set()
    for row in range(ROWS_IN_ORDER):
        codes = torch.zeros((ROWS_IN_ORDER, 2), dtype=torch.int32)
        codes[row] = 15
        packed = in_order(codes).flatten()
        places = packed.nonzero().flatten().tolist()
        kinds = {int(packed[place]) for place in places}
        if len(places) != 2 or len(kinds) != 1 or not kinds <= {0x0F, 0xF0}:
            return None
        offsets.append(places[0])
        strides.add(places[1] - places[0])
        shifts.append(4 if kinds == {0xF0} else 0)
    stride = strides.pop()
    if strides or ROWS_IN_ORDER % (2 * stride):
        return None
    return Order(stride, tuple(offsets[: 2 * stride]), tuple(shifts[: 2 * stride]))
