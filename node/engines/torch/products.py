"""Packed matrices in the place of parameters: products with them, and looking up their rows.

The library's modules stay as they are. What they hand to torch in place of a tensor knows the few functions that they
call, by torch's own protocol for that (`__torch_function__`); any other function is refused by name. A product
unpacks some rows at a time, so a packed model never exists in full precision, not even a matrix of it. Knows nothing
of files or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import embedding, linear

from cluster.errors import ModelError
from cluster.limits import UNPACKED_BYTES_MAX
from node.engines.torch.packed import Packed, gathered, rows_of, tensors_of
from node.engines.torch.planes import Planes

_ELEMENT_BYTES = 16
"""Of one number while it is unpacked, at most: indexes and numbers of four bytes, what scales them, the result."""

_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_CHUNK_ELEMENTS_ELSEWHERE = UNPACKED_BYTES_MAX // _ELEMENT_BYTES
"""Unpacked at a time: about what a core's cache holds (measured from 2^14 to 2^20), or what the limit allows."""

_MATMULS = frozenset({torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__})


class _InPlaceOfATensor:
    """Where torch expects a tensor: it computes with what is behind it, or refuses the function by name."""

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        weight = args[1] if len(args) > 1 else None
        if function is linear and isinstance(weight, Whole | Joined):
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            product = weight.product(args[0])
            return product if bias is None else product + bias
        if function is embedding and isinstance(weight, Whole):
            return weight.looked_up(args[0])
        if function in _MATMULS and isinstance(weight, Transposed):
            return weight.matrix.product(args[0])
        raise ModelError(
            f"the torch engine computes no {getattr(function, '__name__', function)} with packed weights; "
            "use the unquantised model"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ModelError(f"the torch engine knows no {name} of packed weights; use the unquantised model")


class Whole(_InPlaceOfATensor):
    """One packed matrix [outputs, inputs] whose products and rows are of `dtype`."""

    def __init__(self, packed: Packed | Planes, dtype: torch.dtype, order: torch.Tensor | None = None) -> None:
        self.packed = packed
        self.dtype = dtype
        self.order = order  # the input that each packed column belongs to; None: in their order
        self.device = packed.codes.device
        self.shape = (packed.rows, packed.columns)

    @property
    def nbytes(self) -> int:
        """All that it keeps in memory."""
        parts = tensors_of(self.packed) if not isinstance(self.packed, Planes) else self.packed.tensors
        return sum(tensor.nbytes for tensor in parts) + (0 if self.order is None else self.order.nbytes)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[..., outputs] of [..., inputs]."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if isinstance(self.packed, Planes):
            return self.packed.product(x)
        rows, columns = self.shape
        flat = x.reshape(-1, columns)
        product = x.new_empty((flat.shape[0], rows))
        if flat.shape[0] == 1 and self.device.type == "cpu":
            flat = flat.float()  # as the numbers are made: rounding them takes longer than what is won
        for first in range(0, rows, step := self._step()):
            last = min(rows, first + step)
            product[:, first:last] = linear(flat, rows_of(self.packed, first, last).values().to(flat.dtype))
        return product.view(*x.shape[:-1], rows)

    def looked_up(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows with these indexes, [..., inputs]."""
        found = torch.empty((rows.numel(), self.shape[1]), dtype=self.dtype, device=self.device)
        for part, place in zip(rows.flatten().split(self._step()), found.split(self._step()), strict=True):
            place.copy_(self._rows(part))
        return found.view(*rows.shape, -1)

    def unpacked(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last)."""
        return self._rows(torch.arange(first, last, device=self.device))

    def _rows(self, rows: torch.Tensor) -> torch.Tensor:
        values = self.packed.values(rows) if isinstance(self.packed, Planes) else gathered(self.packed, rows).values()
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order.long(), values)
        return values.to(self.dtype)

    def _step(self) -> int:
        return max(1, _CHUNK_ELEMENTS.get(self.device.type, _CHUNK_ELEMENTS_ELSEWHERE) // self.shape[1])


class Joined(_InPlaceOfATensor):
    """Two matrices as one: one below the other, or their rows in turns."""

    def __init__(self, first: Whole, second: Whole, *, in_turns: bool) -> None:
        self.parts, self.in_turns = (first, second), in_turns
        self.dtype, self.device = first.dtype, first.device
        self.shape = (first.shape[0] + second.shape[0], first.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        products = [part.product(x) for part in self.parts]
        return torch.stack(products, dim=-1).flatten(-2) if self.in_turns else torch.cat(products, dim=-1)


class Transposed(_InPlaceOfATensor):
    """[inputs, outputs] of a matrix: what some models' experts multiply with from the right."""

    def __init__(self, matrix: Whole | Joined) -> None:
        self.matrix = matrix
        self.dtype, self.device, self.shape = matrix.dtype, matrix.device, matrix.shape[::-1]


class Stack(_InPlaceOfATensor):
    """A matrix for each expert; their modules take them out one by one."""

    def __init__(self, experts: Sequence[Whole | Joined], *, transposed: bool) -> None:
        self.experts, self.transposed = tuple(experts), transposed
        first = self.experts[0]
        self.dtype, self.device = first.dtype, first.device
        self.shape = (len(self.experts), *(first.shape[::-1] if transposed else first.shape))

    @property
    def nbytes(self) -> int:
        return sum(expert.nbytes for expert in self.experts)

    def __getitem__(self, index: int | torch.Tensor) -> Whole | Joined | Transposed:
        expert = self.experts[int(index)]
        return Transposed(expert) if self.transposed else expert
