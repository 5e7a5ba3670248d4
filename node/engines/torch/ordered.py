"""Matrices of linear layers in the order of the CPU's own product, in the place of parameters.

oneDNN multiplies 16-bit matrices in blocks. Of a plain one it makes such blocks anew in every product, which at one row
costs a third of the time; so a load makes them once, some rows at a time, and nothing stays in the old order. What
asks for more than a product gets the plain matrix, made anew. Stacks of experts are such matrices, one for each.
Knows no files and no models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import linear

_BLOCK_ROWS = 64
"""Parts are multiples of it, so that the kernel's blocks need no padding."""

_PART_BYTES = 32 << 20
"""Of a matrix at a time, while a load puts it in order: that much more than the matrix exists then."""

Fill = Callable[[torch.Tensor, int], None]
"""Reads rows of a matrix into the tensor, from the row with that index on."""


class Ordered:
    """A matrix [outputs, inputs]; its rows in parts."""

    def __init__(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        self.parts = tuple(parts)
        self.shape = torch.Size((sum(part.shape[0] for part in parts), parts[0].shape[1]))
        self.dtype, self.device, self.ndim = dtype, torch.device("cpu"), 2
        self.nbytes = self.shape.numel() * dtype.itemsize

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., outputs] of [..., inputs]."""
        if x.numel() == 0:
            return x.new_zeros((*x.shape[:-1], self.shape[0]))
        if len(self.parts) == 1:
            return _product(x, self.parts[0], bias)
        product, first = x.new_empty((*x.shape[:-1], self.shape[0])), 0
        for part in self.parts:
            rows = slice(first, first := first + part.shape[0])
            product[..., rows] = _product(x, part, None if bias is None else bias[rows])
        return product

    def plain(self) -> torch.Tensor:
        """A copy, row by row."""
        return torch.cat([part.to_dense() for part in self.parts])

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if function is linear and len(args) > 1 and isinstance(args[1], Ordered):
            return args[1].product(args[0], *args[2:], **named)
        return function(*map(_plain, args), **{name: _plain(value) for name, value in named.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.plain(), name)


class OrderedStack:
    """A matrix for each expert, all of one shape; their modules take them out one by one."""

    def __init__(self, experts: Sequence[Ordered]) -> None:
        self.experts, first = tuple(experts), experts[0]
        self.shape = torch.Size((len(experts), *first.shape))
        self.dtype, self.device, self.ndim = first.dtype, first.device, 3
        self.nbytes = sum(expert.nbytes for expert in experts)

    def __getitem__(self, index: int | torch.Tensor) -> Ordered:
        return self.experts[int(index)]

    def plain(self) -> torch.Tensor:
        """A copy, row by row."""
        return torch.stack([expert.plain() for expert in self.experts])


def in_order(shape: torch.Size, dtype: torch.dtype, fill: Fill) -> Ordered:
    """The matrix that `fill` reads."""
    rows, columns = shape
    step = max(1, _PART_BYTES // (columns * dtype.itemsize * _BLOCK_ROWS)) * _BLOCK_ROWS
    parts = []
    for first in range(0, rows, step):
        plain = torch.empty((min(step, rows - first), columns), dtype=dtype)
        fill(plain, first)
        parts.append(torch.ops.mkldnn._reorder_linear_weight(plain, None))
    return Ordered(parts, dtype)


@lru_cache
def has_order(dtype: torch.dtype) -> bool:
    """Whether this processor's products take such matrices. Tried on a small one, whose products are exact."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    try:
        if asked is None or not getattr(torch.ops.mkldnn, asked)():
            return False
        matrix = (torch.arange(_BLOCK_ROWS * 128) % 7 - 3).view(_BLOCK_ROWS, 128).to(dtype)
        x = matrix[:3] + 1
        found = Ordered([torch.ops.mkldnn._reorder_linear_weight(matrix, None)], dtype)
        return torch.equal(found.product(x), linear(x, matrix)) and torch.equal(found.plain(), matrix)
    except (AttributeError, RuntimeError):  # as builds of torch without oneDNN, or without these functions, say it
        return False


def _product(x: torch.Tensor, part: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, part, bias, "none", [], "")
    return product


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, Ordered) else value
