"""What is read by rows, and what becomes of it: a matrix in a file with the form that its rows take, or one that whole
tensors tell. Reads nothing; `rows` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import mlx.core as mx

from cluster.models.checkpoint import StoredTensor
from cluster.models.matrices import Role


@dataclass(frozen=True, slots=True)
class Made:
    """One of the arrays that a matrix becomes."""

    ending: str  # of the parameter's name
    columns: int
    dtype: mx.Dtype


class Form(Protocol):
    """What becomes of a matrix' rows."""

    @property
    def made(self) -> tuple[Made, ...]: ...

    def convert(self, numbers: mx.array, first: int) -> tuple[mx.array, ...]:
        """Rows as they are stored, from `first` on, as each of what is made of them. Some columns only, whole groups of
        them, where inputs come first in the file."""
        ...


@dataclass(frozen=True, slots=True)
class AsStored:
    """The numbers stay what they are."""

    columns: int
    dtype: mx.Dtype

    @property
    def made(self) -> tuple[Made, ...]:
        return (Made("weight", self.columns, self.dtype),)

    def convert(self, numbers: mx.array, first: int) -> tuple[mx.array, ...]:
        return (numbers,)


@dataclass(frozen=True, slots=True)
class Source:
    """A matrix in a file, or several in one tensor; [.., inputs, outputs] where it is turned."""

    tensor: StoredTensor
    form: Form
    turned: bool = False

    @property
    def made(self) -> tuple[Made, ...]:
        return self.form.made

    @property
    def mark_shape(self) -> tuple[int, ...]:
        """Of the column of marks in the place of the tensor."""
        shape = self.tensor.shape
        return (shape[0], 1, shape[2]) if self.turned else (*shape[:-1], 1)

    @property
    def matrices(self) -> int:
        return self.tensor.shape[0] if self.turned else 1

    @property
    def columns(self) -> int:
        return self.tensor.shape[-2 if self.turned else -1]

    @property
    def rows(self) -> int:
        """Of each matrix."""
        return prod(self.tensor.shape) // self.columns // self.matrices


@dataclass(frozen=True, slots=True)
class Computed:
    """A matrix that only whole tensors tell, one of many: it is read and computed whole, and nothing of it stays but
    where its rows are copied to."""

    tensors: Mapping[Role, StoredTensor]
    rows: int
    made: tuple[Made, ...]
    compute: Callable[[Mapping[Role, mx.array]], tuple[mx.array, ...]]  # what is made, of all rows
    matrices: int = 1

    @property
    def mark_shape(self) -> tuple[int, ...]:
        return (self.rows, 1)
