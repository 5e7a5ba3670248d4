"""Whether the stored tensors of a matrix of integers fit together, and the shape of the matrix.

Owns: the layouts of AWQ, GPTQ and compressed-tensors as far as headers tell them. Everything an engine unpacks later
has been checked here. Reads no values.
"""

from __future__ import annotations

from typing import assert_never

from cluster.errors import ModelError
from cluster.models.checkpoint import StoredTensor
from cluster.models.formats import Packing, Quantization
from cluster.types import Backend, DType

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The rows whose values an AWQ word holds, from its lowest bits up; AutoAWQ's kernels unpack pairs in this order."""

OTHER_ZEROS = "config.json says that the weights are symmetric (sym), and the files hold zeros off the middle"
OTHER_ORDER = "config.json says that columns lie in the order of their groups, and g_idx says that they do not"

INTEGER_PACKINGS = frozenset({Packing.AWQ, Packing.GPTQ, Packing.INTEGERS})

MLX_GROUPS = (128, 64, 32)
"""Columns that may share a scale in MLX. The scale of a larger group is repeated."""

_WORD_BITS = 32
_SCALES = frozenset({DType.F32, DType.F16, DType.BF16})


def unpacked_shape(
    stated: Quantization,
    codes: StoredTensor,
    scales: StoredTensor,
    zeros: StoredTensor | None,
    order: StoredTensor | None,
    where: str,
) -> tuple[int, int]:
    """[outputs, inputs] of the matrix whose integers `codes` holds."""
    if codes.dtype is not DType.I32 or len(codes.shape) != 2 or 0 in codes.shape:
        raise _unfit(codes, "a matrix of I32", where)
    per_word = _WORD_BITS // stated.bits
    first, last = codes.shape
    match stated.kind:
        case Packing.AWQ:
            rows, columns, packed_rows = last * per_word, first, last
        case Packing.GPTQ:
            rows, columns, packed_rows = last, first * per_word, last // per_word
        case Packing.INTEGERS:
            rows, columns, packed_rows = first, last * per_word, -(-first // per_word)
        case _:
            raise _unfit(codes, f"weights packed as {stated.kind}", where)
    group = stated.group or columns
    if columns % group or columns % per_word or (rows % per_word and stated.kind is not Packing.INTEGERS):
        raise _unfit(codes, f"whole groups of {group} columns and whole words", where)
    groups = columns // group
    by_row = stated.kind is Packing.INTEGERS
    if scales.dtype not in _SCALES or scales.shape != ((rows, groups) if by_row else (groups, rows)):
        raise _unfit(scales, f"scales for {rows} rows of {groups} groups", where)
    if zeros is None and not (by_row and stated.symmetric):
        raise ModelError(f"{where}: {codes.name!r} has no zeros beside it; download the model again")
    if zeros is not None and (
        zeros.dtype is not DType.I32 or zeros.shape != ((packed_rows, groups) if by_row else (groups, packed_rows))
    ):
        raise _unfit(zeros, f"packed zeros (I32) for {rows} rows of {groups} groups", where)
    if order is not None and (order.dtype is not DType.I32 or order.shape != (columns,)):
        raise _unfit(order, f"the group (I32) of each of {columns} columns", where)
    return rows, columns


def mlx_computes(name: str, group: int) -> bool:
    """Its groups are of 32 columns or multiples of it; and mlx-lm takes apart what expands latents, as numbers."""
    return group % MLX_GROUPS[-1] == 0 and not name.endswith("kv_b_proj.weight")


def pair_bytes(scales: DType, group: int, backend: Backend, dtype: DType, *, symmetric: bool) -> int:
    """What the scale and the bias of one group take in an engine that computes in `dtype`.

    A bias is a zero times a scale. The scale's own type holds it exactly when the zero is a power of two, as half the
    range is; else it is float32. MLX multiplies in the widest type that it is given, so there both are float32 unless
    the model computes in the scale's type.
    """
    match backend:
        case Backend.TORCH:
            return scales.size_bytes + (scales if symmetric else DType.F32).size_bytes
        case Backend.MLX:
            repeats = next((group // allowed for allowed in MLX_GROUPS if group % allowed == 0), 1)
            return repeats * 2 * (scales if symmetric and scales is dtype else DType.F32).size_bytes
        case _:
            assert_never(backend)


def _unfit(tensor: StoredTensor, expected: str, where: str) -> ModelError:
    return ModelError(
        f"{where}: expected {expected} as {tensor.name!r}, found {tensor.dtype} of shape {list(tensor.shape)}; "
        "download the model again, or its config.json is of another one"
    )
