"""Enough of Triton's language to run the engine's kernels on a processor, one program after another.

What runs is the very source of `ragged_kernels`; only the words that it is written in are these. So every machine
checks the kernels, though Triton takes 690 MB and has no build for some. `make kernels` runs the same tests by Triton's
own interpreter, and its compiler. Stricter than a GPU: a promised alignment is checked, what is masked and has no
replacement reads as NaN, and sizes that Triton would not take are refused.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

import node.engines.torch

SOURCE = Path(node.engines.torch.__file__).with_name("ragged_kernels.py")


def load_kernels(mutate: Callable[[str], str] = lambda source: source) -> ModuleType:
    """The kernels' module, written in the words below. `mutate` may change its source, to see that this is noticed."""
    triton, language, module = ModuleType("triton"), ModuleType("triton.language"), ModuleType("ragged_kernels")
    vars(triton).update(jit=_Kernel, language=language)
    vars(language).update(_LANGUAGE)
    with patch.dict(sys.modules, {"triton": triton, "triton.language": language}):
        exec(compile(mutate(SOURCE.read_text()), SOURCE, "exec"), vars(module))
    return module


@dataclass(frozen=True)
class PointerType:
    element_ty: torch.dtype


class Pointer:
    """One address or many."""

    def __init__(self, addresses: torch.Tensor, dtype: PointerType) -> None:
        self.addresses, self.dtype = addresses, dtype

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.addresses + offset * self.dtype.element_ty.itemsize, self.dtype)


class _Kernel:
    grid: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_stages: int = 0, num_warps: int = 0, **named: Any) -> None:
            _Kernel.grid = grid
            for _Kernel.ids in product(*map(range, grid)):
                self._function(*map(_argument, args), **named)

        return launch


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(torch.tensor(value.data_ptr()), PointerType(value.dtype))
    return value


def _memory(pointer: Pointer, mask: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What lies around the addresses that are not masked, where in it they are, and which are not."""
    kept = torch.as_tensor(True if mask is None else mask).broadcast_to(pointer.addresses.shape)
    addresses = pointer.addresses[kept]
    element = pointer.dtype.element_ty
    if not addresses.numel():
        return torch.empty(0, dtype=element), addresses, kept
    first = int(addresses.min())
    assert not ((addresses - first) % element.itemsize).any()
    size = int(addresses.max()) - first + element.itemsize
    memory = torch.frombuffer((ctypes.c_char * size).from_address(first), dtype=element)
    return memory, (addresses - first) // element.itemsize, kept


def _load(pointer: Pointer, mask: Any = None, other: float | None = None) -> torch.Tensor:
    memory, places, kept = _memory(pointer, mask)
    missing = (torch.nan if memory.is_floating_point() else -(1 << 60)) if other is None else other
    found = torch.full(pointer.addresses.shape, missing, dtype=memory.dtype)
    found[kept] = memory[places]
    return found


def _store(pointer: Pointer, value: torch.Tensor, mask: Any = None) -> None:
    memory, places, kept = _memory(pointer, mask)
    memory[places] = value.broadcast_to(kept.shape)[kept].to(memory.dtype)


def _cast(value: Any, dtype: Any) -> Any:
    return Pointer(value, dtype) if isinstance(dtype, PointerType) else torch.as_tensor(value).to(dtype)


def _arange(first: int, last: int) -> torch.Tensor:
    assert (last - first).bit_count() == 1, "Triton counts to powers of two"
    return torch.arange(first, last)


def _dot(left: torch.Tensor, right: torch.Tensor, *, input_precision: str) -> torch.Tensor:
    assert min(*left.shape, *right.shape) >= 16, "matrix units know no smaller products"
    assert left.dtype == right.dtype
    return left.float() @ right.float()


def _multiple_of(pointer: Pointer, factor: int) -> Pointer:
    assert not (pointer.addresses % factor).any(), "a promise about an address does not hold"
    return pointer


_LANGUAGE: dict[str, Any] = {
    "constexpr": None,
    "float32": torch.float32,
    "int64": torch.int64,
    "pointer_type": PointerType,
    "program_id": lambda axis: _Kernel.ids[axis],
    "num_programs": lambda axis: _Kernel.grid[axis],
    "load": _load,
    "store": _store,
    "cast": _cast,
    "multiple_of": _multiple_of,
    "arange": _arange,
    "zeros": lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    "full": lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
    "where": torch.where,
    "maximum": lambda left, right: torch.maximum(torch.as_tensor(left), torch.as_tensor(right)),
    "minimum": lambda left, right: torch.minimum(torch.as_tensor(left), torch.as_tensor(right)),
    "max": lambda value, axis: value.amax(dim=axis),
    "sum": lambda value, axis: value.sum(dim=axis),
    "cdiv": lambda left, right: (left + right - 1) // right,
    "dot": _dot,
    "trans": lambda value: value.T,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
}
