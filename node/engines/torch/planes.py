"""Matrices with codes of 2 to 8 bits as products of four-bit codes, in the memory that their codes took.

A code is cut into planes: its lowest four bits, and what is above them. `16 * high + low` times a scale is the sum of
two products with codes of four bits, and two planes side by side are one matrix with twice the columns, multiplied by
the same input twice. So one call of the kernel gives the product, with one rounding. A plane of fewer bits lies in
pieces on top of each other, and is taken apart some rows at a time, in the processor's cache. Many rows of input are
multiplied with weights that are unpacked, some rows at a time. Knows nothing of files or models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from node.engines.torch import int4

_EXPANDED_BYTES = 1 << 20
"""Of planes that are taken apart at a time: half of what a core's cache holds."""

_SCALING_BYTES = 4 << 20
"""Of scales and zeros of planes that are made at a time."""

_UNPACKED_ELEMENTS = 1 << 19
"""Unpacked at a time for many rows of input, or a block of rows: their float32 are what a core's cache holds."""

_CENTRED_ELEMENTS = 1 << 18
"""Of these on their way, in some columns."""

_UNPACKED_COLUMNS_MAX = 7 << 12
"""Of a matrix that is unpacked: a block of 64 rows takes 3.7 MiB then, which the limit allows with what is on its way.
The kernel computes wider ones however many the rows of input are."""

_KERNEL_ROWS: Final[Mapping[str, Mapping[int, int]]] = {"AVX2": {1: 64, 2: 24}, "AVX512": {1: 512, 2: 56}}
"""By a processor's width and planes: rows of input up to which the kernel takes less time than unpacking and a plain
product (measured)."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Some bits of every code. In the kernel's codes of four bits they are the highest ones."""

    lowest: int
    bits: int

    @property
    def pieces(self) -> int:
        """How many codes lie on top of each other."""
        return 4 // self.bits

    @property
    def shift(self) -> int:
        """From the kernel's code to these bits of the format's."""
        return self.lowest + self.bits - 4

    @property
    def mask(self) -> int:
        """Their place in both codes of each byte of a word."""
        return _in_each_byte(0x11 * (0xF << (4 - self.bits) & 0xF))


PLANES: Final[Mapping[int, tuple[Plane, ...]]] = {
    2: (Plane(0, 2),),
    3: (Plane(0, 2), Plane(2, 1)),
    4: (Plane(0, 4),),
    5: (Plane(0, 4), Plane(4, 1)),
    6: (Plane(0, 4), Plane(4, 2)),
    8: (Plane(0, 4), Plane(4, 4)),
}
"""By bits of a code."""


@dataclass(frozen=True, slots=True)
class Planes:
    """A matrix in the kernel's order: of each block of rows one plane after another."""

    codes: torch.Tensor  # uint8 [rows, columns * bits / 8]; which code lies where is the kernel's business
    scaling: torch.Tensor  # bfloat16 [groups, rows, 2]: scales, and zeros of the highest plane
    bits: int

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * 8 // self.bits

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that it keeps in memory."""
        return self.codes, self.scaling

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """bfloat16 [..., rows] of bfloat16 [..., columns]."""
        flat, planes = x.reshape(-1, self.columns).contiguous(), PLANES[self.bits]
        order = int4.order_of_codes()
        assert order is not None, "only matrices whose order is known are made"
        are_many = flat.shape[0] > _kernel_rows(len(planes)) and self.columns <= _UNPACKED_COLUMNS_MAX
        if are_many and self.rows % (2 * order.stride) == 0:
            product = self._product_with_unpacked(flat, order)
        else:
            product = self._product_by_kernel(_repeated(flat, len(planes)), order)
        return product.view(*x.shape[:-1], self.rows)

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [rows, columns] of the rows with these indexes."""
        order = int4.order_of_codes()
        assert order is not None, "only matrices whose order is known are made"
        block, bytes_per_row = 2 * order.stride, self.codes.shape[1]
        starts = rows // block * (block * bytes_per_row) + torch.tensor(order.offsets)[rows % block]
        shifts = torch.tensor(order.shifts, dtype=torch.uint8)[rows % block, None]
        codes = torch.zeros((len(rows), self.columns), dtype=torch.uint8)
        for plane in PLANES[self.bits]:
            width = self.columns // plane.pieces
            found = self.codes.flatten()[starts[:, None] + order.stride * torch.arange(width)] >> shifts
            pieces = [found >> (4 - plane.bits * (1 + piece)) for piece in range(plane.pieces)]
            codes |= (torch.cat(pieces, dim=1) & ((1 << plane.bits) - 1)) << plane.lowest
            starts = starts + width * order.stride
        scales, biases = self._scales_and_biases(self.scaling[:, rows])
        grouped = codes.float().unflatten(-1, (self.scaling.shape[0], -1))
        return torch.addcmul(biases.T[..., None], grouped, scales.T[..., None]).flatten(-2)

    def _scaling(self, rows: slice) -> torch.Tensor:
        """Of these rows of all planes, side by side. Both numbers of a pair are one word here, the scale in its lower
        half, and adding to their exponents multiplies them."""
        planes, pairs = PLANES[self.bits], self.scaling[:, rows]
        if planes[-1].shift == 0:
            return pairs.contiguous()
        words = pairs.view(torch.int32).squeeze(-1)
        scaling = words.new_empty((len(planes), *words.shape))
        for plane, part in zip(planes[:-1], scaling[:-1], strict=True):
            # Zeros that take back the kernel's eight.
            torch.bitwise_and(words, 0xFFFF, out=part)
            part.mul_(0x10001).add_((3 + plane.shift << 23) + (plane.shift << 7))
        torch.add(words, planes[-1].shift << 7, out=scaling[-1])
        return scaling.flatten(0, 1).view(torch.bfloat16).unflatten(-1, (-1, 2))

    def _scales_and_biases(self, scaling: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the format's codes are multiplied with, and what is added then; float32 [groups, rows]."""
        scales, zeros = scaling.float().unbind(-1)
        return scales, zeros - middle_of(self.bits) * scales

    def _product_by_kernel(self, wide: torch.Tensor, order: int4.Order) -> torch.Tensor:
        """bfloat16 [tokens, rows] of the input once for each plane; scales for all rows of a large matrix would be an
        eighth of it."""
        planes, in_pieces = PLANES[self.bits], any(plane.pieces > 1 for plane in PLANES[self.bits])
        if in_pieces:
            step = max(1, _EXPANDED_BYTES // (wide.shape[1] * order.stride)) * 2 * order.stride
        else:
            bytes_per_row = 4 * len(planes) * self.scaling.shape[0]
            step = max(1, _SCALING_BYTES // (bytes_per_row * int4.ROWS_IN_ORDER)) * int4.ROWS_IN_ORDER
            if len(planes) == 1 or step >= self.rows:
                return int4.product(wide, self.codes, self._scaling(slice(None)))
        product = wide.new_empty((wide.shape[0], self.rows))
        for first in range(0, self.rows, step):
            rows = slice(first, min(first + step, self.rows))
            codes = self._expanded(rows, order) if in_pieces else self.codes[rows]
            product[:, rows] = int4.product(wide, codes, self._scaling(rows))
        return product

    def _expanded(self, rows: slice, order: int4.Order) -> torch.Tensor:
        """uint8 [rows, planes * columns / 2]: what the kernel takes of whole blocks of rows."""
        words = self._words(rows, slice(0, self.columns), order)
        return words.view(torch.uint8).view(rows.stop - rows.start, -1)

    def _words(self, rows: slice, columns: slice, order: int4.Order) -> torch.Tensor:
        """int64 [blocks, planes, columns * stride / 8]: eight bytes at a time of whole blocks of rows."""
        planes, part = PLANES[self.bits], self.codes[rows]
        begin, end, size = (column * order.stride // 8 for column in (columns.start, columns.stop, self.columns))
        # A row need not end with a word, but a block does.
        words = part.flatten().view(torch.int64).view(part.shape[0] // (2 * order.stride), -1)
        if all(plane.bits == 4 for plane in planes):
            return words.view(len(words), len(planes), size)[..., begin:end]
        expanded = words.new_empty((len(words), len(planes), end - begin))
        for index, plane in enumerate(planes):
            width = size // plane.pieces
            for piece in range(plane.pieces):
                low, high = max(begin, piece * width), min(end, (piece + 1) * width)
                if low >= high:
                    continue
                found = words[:, low - piece * width : high - piece * width]
                place = expanded[:, index, low - begin : high - begin]
                if piece == 0:
                    torch.bitwise_and(found, plane.mask, out=place)
                else:
                    torch.bitwise_left_shift(found, piece * plane.bits, out=place)
                    place &= plane.mask
            words = words[:, width:]
        return expanded

    def _product_with_unpacked(self, flat: torch.Tensor, order: int4.Order) -> torch.Tensor:
        """Zeros are multiplied with the inputs' sums over each group; two numbers hold a sum more exactly than one."""
        block, places, groups = 2 * order.stride, order.rows, self.scaling.shape[0]
        product = flat.new_empty((flat.shape[0], self.rows))
        sums = flat.unflatten(-1, (groups, -1)).sum(-1, dtype=torch.float32)
        rounded = sums.to(flat.dtype)
        wide = torch.cat((flat, rounded, (sums - rounded).to(flat.dtype)), dim=-1)
        step = max(1, _UNPACKED_ELEMENTS // (self.columns * block)) * block
        room = Room.for_rows(min(step, self.rows), self.columns, groups)
        for first in range(0, self.rows, step):
            rows = slice(first, min(first + step, self.rows))
            part = wide @ self._unpacked(rows, order, room)
            if places is None:
                product[:, rows] = part
            else:
                product[:, rows].unflatten(-1, (-1, block))[..., places] = part.unflatten(-1, (-1, block))
        return product

    def _unpacked(self, rows: slice, order: int4.Order, room: Room) -> torch.Tensor:
        """bfloat16 [columns, rows] of whole blocks of rows without their zeros, which follow twice for each group; the
        rows of a block as in `order`."""
        count, groups, stride = rows.stop - rows.start, self.scaling.shape[0], order.stride
        scaling = self.scaling[:, rows].unflatten(1, (-1, 2 * stride))
        scaling = scaling if order.rows is None else scaling[:, :, order.rows]
        scales = (scaling[..., 0] * 2.0 ** (self.bits - 8)).view(groups, -1, 2, 1, stride).permute(1, 2, 0, 3, 4)
        unpacked = room.unpacked[: count * (self.columns + 2 * groups)].view(-1, count)
        weights, zeros = unpacked[: self.columns], unpacked[self.columns :]
        group, step = self.columns // groups, _columns_at_once(count)
        for first in range(0, self.columns, step):
            columns = slice(first, min(first + step, self.columns))
            some = slice(columns.start // group, columns.stop // group)
            centred = self._centred(rows, columns, order, room)
            numbers = room.numbers[: centred.numel()].copy_(centred).view(-1, 2, some.stop - some.start, group, stride)
            part = weights[columns].view(-1, group, count // (2 * stride), 2, stride).permute(2, 3, 0, 1, 4)
            torch.mul(numbers, scales[:, :, some], out=part)
        zeros.view(2, groups, -1, 2 * stride).copy_(scaling[..., 1])
        return unpacked

    def _centred(self, rows: slice, columns: slice, order: int4.Order, room: Room) -> torch.Tensor:
        """int8 [blocks x 2 x columns x stride]: codes as the highest bits of a byte, less the byte in the middle."""
        planes = PLANES[self.bits]
        words = self._words(rows, columns, order)
        halves = room.words[: 2 * len(words) * words.shape[-1]].view(len(words), 2, -1)
        # The highest plane first, all of whose bits stay at the top.
        torch.bitwise_left_shift(words[:, -1], 4, out=halves[:, 0])
        halves[:, 0] &= _in_each_byte(0xF0)
        torch.bitwise_and(words[:, -1], _in_each_byte(0xF0), out=halves[:, 1])
        for plane, both in zip(planes[:-1], words[:, :-1].unbind(1), strict=True):
            up = plane.shift + 8 - self.bits  # from the lower half of a byte
            halves[:, 0] |= (both << up) & _in_each_byte(0x0F << up)
            halves[:, 1] |= (both >> (4 - up)) & _in_each_byte(0xF0 >> (4 - up))
        halves ^= _in_each_byte(0x80)
        return halves.view(torch.int8).flatten()


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that chunk after chunk is unpacked in; new memory takes longer than what is done in it."""

    words: torch.Tensor  # int64
    numbers: torch.Tensor  # bfloat16
    unpacked: torch.Tensor  # bfloat16

    @classmethod
    def for_rows(cls, rows: int, columns: int, groups: int) -> Room:
        some = rows * min(columns, _columns_at_once(rows))
        return cls(
            torch.empty(some // 8, dtype=torch.int64),
            torch.empty(some, dtype=torch.bfloat16),
            torch.empty(rows * (columns + 2 * groups), dtype=torch.bfloat16),
        )


def middle_of(bits: int) -> int:
    """The code of the weight that a zero is."""
    return 1 << (bits - 1)


def _kernel_rows(planes: int) -> int:
    return _KERNEL_ROWS.get(torch.backends.cpu.get_cpu_capability(), _KERNEL_ROWS["AVX2"])[planes]


def _columns_at_once(rows: int) -> int:
    """Whole groups, however wide they are."""
    widest = max(int4.GROUPS)
    return max(1, _CENTRED_ELEMENTS // (rows * widest)) * widest


def _repeated(flat: torch.Tensor, count: int) -> torch.Tensor:
    return flat if count == 1 else flat.repeat(1, count)


def _in_each_byte(byte: int) -> int:
    """Of a word of eight, as a signed integer."""
    return int.from_bytes(bytes([byte] * 8), "little", signed=True)
