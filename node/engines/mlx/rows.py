"""Matrices that are read some rows at a time, straight into the memory where they stay.

mlx-lm's models split, stack and rename tensors before they take them. Lazy as that is, a tensor is there whole while it
is converted, and a stack of experts twice while it is made. So in the place of a matrix they get a column of marks, one
for each row; what they make of the marks tells where each row goes. Owns that, and reading files; what rows become is
`sources`, and which matrices are read like this `by_rows`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from cluster.errors import ModelError
from cluster.models.checkpoint import StoredTensor
from cluster.models.quantising import GROUP
from cluster.quantities import MIB
from cluster.types import DType
from node.engines.mlx.sources import Computed, Made, Source
from node.engines.mlx.tensors import MLX_DTYPES, Bits, as_bits, read_bits

_NUMBERS_AT_ONCE: Final = MIB // 4
"""A core's cache holds as many in float32, and no slice is so small that they show."""

_ROW_BITS: Final = 32
"""Of a mark; above them is the number of the matrix."""

_STORED_BITS: Final[Mapping[DType, npt.DTypeLike]] = {
    DType.F32: np.uint32,
    DType.F16: np.uint16,
    DType.BF16: np.uint16,
    DType.F8_E4M3: np.uint8,
    DType.U32: np.uint32,
    DType.I32: np.int32,
    DType.I64: np.int64,
}
"""What can be read like this, as numpy sees it."""

_Marks = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of one matrix that follow each other in a parameter, in steps of `step`."""

    source: Source | Computed
    matrix: int
    first: int
    count: int
    step: int

    @property
    def taken(self) -> slice:
        return slice(self.first, self.first + (self.count - 1) * self.step + 1, self.step)


class RowReader:
    """Reads `sources`, which are called as mlx-lm's models are given them."""

    def __init__(self, folder: Path, sources: Mapping[str, Source | Computed]) -> None:
        self._folder, self._sources = folder, sources
        self._matrices = [(source, index) for source in sources.values() for index in range(source.matrices)]
        # A matrix' [.., rows], whether it is turned, and where its rows are.
        self._blocks: dict[str, tuple[tuple[int, ...], bool, list[_Block]]] = {}
        self._matrix_of: dict[str, str] = {}  # of each parameter that is made of it
        self._done: dict[str, mx.array] = {}
        self._buffer = np.empty(0, np.uint8)

    def marks(self) -> dict[str, mx.array]:
        """In the place of tensors: [.., rows, 1], lazily."""
        marks, number = {}, 0
        with mx.stream(mx.cpu):
            for name, source in self._sources.items():
                of_matrices = [
                    mx.arange(at << _ROW_BITS, (at << _ROW_BITS) + source.rows, dtype=mx.uint64)
                    for at in range(number, number + source.matrices)
                ]
                marks[name] = mx.concatenate(of_matrices).reshape(source.mark_shape)
                number += source.matrices
        return marks

    def placed(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """`weights`, which are taken, with what will be read in the place of marks: zeros that nobody computes. No
        other tensor is of their type. Marks that lie in a row, [.., 1, rows], are those of a turned matrix."""
        result: dict[str, mx.array] = {}
        for name in list(weights):
            array = weights.pop(name)
            if array.dtype != mx.uint64:
                result[name] = array
                continue
            lies = array.shape[-1] > 1
            rows = (*array.shape[:-2], array.shape[-1]) if lies else array.shape[:-1]
            marks = np.array(array, dtype=np.int64).reshape(-1)
            blocks = list(self._blocks_of(name, marks, rows[-1] if lies else len(marks)))
            self._blocks[name] = rows, lies, blocks
            for made in blocks[0].source.made:
                parameter = f"{name.removesuffix('weight')}{made.ending}"
                result[parameter] = mx.zeros(_shape(rows, lies, made), made.dtype)
                self._matrix_of[parameter] = name
        return result

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._matrix_of

    def read(self, parameter: str) -> mx.array:
        """Everything that is made of the same rows is read when the first of it is asked for."""
        if parameter not in self._done:
            self._read(self._matrix_of[parameter])
        return self._done.pop(parameter)

    def _blocks_of(self, name: str, marks: _Marks, together: int) -> Iterator[_Block]:
        """Cut where another matrix begins, after every `together` rows, or where rows stop to follow at the same
        distance."""
        numbers, rows = marks >> _ROW_BITS, marks & ((1 << _ROW_BITS) - 1)
        steps = np.diff(rows)
        begin, made = 0, self._matrices[int(numbers[0])][0].made
        other_matrix = (np.flatnonzero(np.diff(numbers)) + 1).tolist()
        for end in sorted({*other_matrix, *range(together, len(marks), together), len(marks)}):
            source, matrix = self._matrices[int(numbers[begin])]
            if source.made != made:
                raise ModelError(f"{name} is made of tensors of several types; the MLX engine does not read this model")
            while begin < end:
                step = int(steps[begin]) if begin + 1 < end else 1
                other = np.flatnonzero(steps[begin : end - 1] != step)
                count = int(other[0]) + 1 if other.size else end - begin
                yield _Block(source, matrix, int(rows[begin]), count, step)
                begin += count

    def _read(self, name: str) -> None:
        rows, lies, blocks = self._blocks.pop(name)
        made = blocks[0].source.made
        with mx.stream(mx.cpu):
            arrays = [mx.zeros(_shape(rows, lies, each), _BITS_OF.get(each.dtype, each.dtype)) for each in made]
            mx.eval(arrays)
            # What numpy sees is MLX's own memory: [matrices, rows, columns].
            targets = [_rows_of(np.asarray(memoryview(array)), lies) for array in arrays]  # type: ignore[arg-type]
            begin = 0
            for block in blocks:
                matrix, first = divmod(begin, targets[0].shape[1])
                self._fill_block(block, [target[matrix, first : first + block.count] for target in targets])
                begin += block.count
            for each, array in zip(made, arrays, strict=True):
                parameter = f"{name.removesuffix('weight')}{each.ending}"
                self._done[parameter] = array if array.dtype == each.dtype else array.view(each.dtype)

    def _fill_block(self, block: _Block, targets: list[Bits]) -> None:
        match block.source:
            case Computed() as source:
                self._copy(source, block, targets)
            case Source() as source if source.turned:
                self._fill_turned(source, block, targets)
            case Source() as source:
                self._fill(source, block, targets)

    def _copy(self, source: Computed, block: _Block, targets: list[Bits]) -> None:
        whole = {
            role: self._numbers(tensor, 0, (1, prod(tensor.shape))).reshape(tensor.shape)
            for role, tensor in source.tensors.items()
        }
        for target, array in zip(targets, source.compute(whole), strict=True):
            target[:] = _bits(array)[block.taken]

    def _fill(self, source: Source, block: _Block, targets: list[Bits]) -> None:
        columns = source.columns
        at_once = max(1, _NUMBERS_AT_ONCE // columns) if block.step == 1 else 1
        for begin in range(0, block.count, at_once):
            count = min(at_once, block.count - begin)
            first = block.first + begin * block.step
            numbers = self._numbers(source.tensor, first * columns, (count, columns))
            for target, array in zip(targets, source.form.convert(numbers, first), strict=True):
                target[begin : begin + count] = _bits(array)

    def _fill_turned(self, source: Source, block: _Block, targets: list[Bits]) -> None:
        """Some inputs of all rows at a time: rows lie across."""
        columns, rows = source.columns, source.rows
        at_once = GROUP * max(1, _NUMBERS_AT_ONCE // (rows * GROUP))
        for begin in range(0, columns, at_once):
            end = min(begin + at_once, columns)
            numbers = self._numbers(source.tensor, (block.matrix * columns + begin) * rows, (end - begin, rows))
            for target, array in zip(targets, source.form.convert(numbers[:, block.taken].T, 0), strict=True):
                width = target.shape[1]
                target[:, begin * width // columns : end * width // columns] = _bits(array)

    def _numbers(self, tensor: StoredTensor, skipped: int, shape: tuple[int, int]) -> mx.array:
        """So many numbers of a tensor, after those that are skipped."""
        kind = _STORED_BITS[tensor.dtype]
        size = prod(shape) * tensor.dtype.size_bytes
        if self._buffer.nbytes < size:
            self._buffer = np.empty(size, np.uint8)
        landing = self._buffer[:size]
        _read_exactly(self._folder, tensor, tensor.begin + skipped * tensor.dtype.size_bytes, landing.data)
        bits = mx.array(landing.view(kind).reshape(shape))
        return bits.view(MLX_DTYPES[tensor.dtype]) if tensor.dtype in MLX_DTYPES else bits


def _shape(rows: tuple[int, ...], lies: bool, made: Made) -> tuple[int, ...]:
    return (*rows[:-1], made.columns, rows[-1]) if lies else (*rows, made.columns)


def _rows_of(array: Bits, lies: bool) -> Bits:
    """[matrices, rows, columns]: all rows as one matrix' where they do not lie across."""
    if lies:
        return array.reshape(-1, *array.shape[-2:]).swapaxes(1, 2)
    return array.reshape(1, -1, array.shape[-1])


_BITS_OF: Final = {mx.float16: mx.uint16, mx.bfloat16: mx.uint16}
"""numpy has no bfloat16, and its float16 is not worth an exception."""


def _bits(array: mx.array) -> Bits:
    """An array as it is written into the memory of another."""
    bits = as_bits(array) if array.dtype in _BITS_OF else array
    mx.eval(bits)
    return read_bits(bits)


def _read_exactly(folder: Path, tensor: StoredTensor, offset: int, target: memoryview) -> None:
    try:
        descriptor = os.open(folder / tensor.file, os.O_RDONLY)
        try:
            done = 0
            while done < target.nbytes:
                count = os.preadv(descriptor, [target[done:]], offset + done)
                if count == 0:
                    raise ModelError(f"{tensor.file} ends within {tensor.name!r}; download the model again")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelError(f"{tensor.file} cannot be read ({error.strerror}); it holds {tensor.name!r}") from error
