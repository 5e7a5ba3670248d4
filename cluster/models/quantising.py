"""Packing full-precision weights when they are loaded (`--bits`): which matrices, and what they take then.

Owns: the one rule that engines, facts and plans share. Computes no values; how numbers become codes is MLX's affine
packing in groups of GROUP columns, which the engines make alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Final

from cluster.errors import ModelError, UsageError
from cluster.models.checkpoint import StoredTensor
from cluster.models.family import Family
from cluster.models.formats import Packing, Quantization, Width
from cluster.models.layout import Embedding, Head, Layer, LayerInputs, is_expert, part_of, within_layer
from cluster.models.matrices import Matrix, Role
from cluster.types import DType

BITS: Final = (4, 6, 8)
"""Widths that users may ask for. Fewer lose too much of a model that was not made for it."""

GROUP: Final = 64
"""Columns that share a scale and a bias: MLX's usual group, half a bit for each number in a 16-bit model."""

_FULL_PRECISION: Final = frozenset({DType.F32, DType.F16, DType.BF16})

_WHOLE: Final = (
    # One row that weighs a whole expert for each token.
    "mlp.shared_expert_gate.weight",
    # What makes keys and values of latents: engines hold it cut by head and turned, so that no group is the same.
    "self_attn.kv_b_proj.weight",
    "self_attn.embed_q.weight",
    "self_attn.unembed_out.weight",
)
"""Matrices that stay as they are stored, beside routers: small, and much follows from them."""


def check_bits(bits: int | None) -> int | None:
    """What was typed as --bits."""
    if bits is not None and bits not in BITS:
        raise UsageError(f"expected --bits {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}, found {bits}")
    return bits


def bits_to_pack(bits: int | None, stored: Quantization | None, where: str) -> int | None:
    """The bits to pack a checkpoint in; None when it stays as it is. Packed ones cannot be packed again: what their
    first packing lost would be lost twice."""
    if bits is None or stored is None:
        return bits
    if stored.kind is Packing.AFFINE and stored.bits == bits:
        return None
    raise ModelError(
        f"{where}: the weights are packed already ({stored.kind}, {stored.bits} bits), so --bits {bits} cannot apply; "
        "leave --bits out, or use the unquantised model"
    )


def is_packed_at_load(name: str, shape: tuple[int, ...], family: Family) -> bool:
    """Whether the tensor called `name` is packed: matrices of linear layers, of the embedding and the head, and stacks
    of experts, where groups divide their columns. `shape` ends with the inputs, whatever the order in the file."""
    part, inner = part_of(name), within_layer(name)
    if not isinstance(part, Embedding | LayerInputs | Layer | Head) or not shape or 0 in shape or shape[-1] % GROUP:
        return False
    if inner in _WHOLE or inner == family.router:
        return False
    if len(shape) == 3:
        return is_expert(inner)
    return len(shape) == 2 and inner.endswith("weight")


def is_turned(name: str, family: Family) -> bool:
    """Whether the tensor called `name` is stored with its inputs before its outputs."""
    return within_layer(name) in family.transposed


def inputs_last(name: str, shape: tuple[int, ...], family: Family) -> tuple[int, ...]:
    """The shape with the inputs as the last axis."""
    return (*shape[:-2], shape[-1], shape[-2]) if len(shape) == 3 and is_turned(name, family) else shape


def packed_at_load(matrices: Mapping[str, Matrix], family: Family, bits: int, dtype: DType) -> dict[str, Matrix]:
    """The matrices as engines that compute in `dtype` hold them after packing."""
    return {name: _packed(matrix, family, bits, dtype) for name, matrix in matrices.items()}


def _packed(matrix: Matrix, family: Family, bits: int, dtype: DType) -> Matrix:
    shape = inputs_last(matrix.name, matrix.shape, family)
    if (
        matrix.packing is not Packing.NONE
        or matrix.dtype not in _FULL_PRECISION
        or not is_packed_at_load(matrix.name, shape, family)
    ):
        return matrix
    *rows, columns = shape
    source, groups = matrix.values, (*rows, columns // GROUP)
    tensors = {
        Role.VALUES: _made(source, Role.VALUES, DType.U32, (*rows, columns * bits // 32)),
        Role.SCALES: _made(source, Role.SCALES, dtype, groups),
        Role.BIASES: _made(source, Role.BIASES, dtype, groups),
    }
    return Matrix(matrix.name, Packing.AFFINE, shape, Width(bits, GROUP), tensors)


def _made(source: StoredTensor, role: Role, dtype: DType, shape: tuple[int, ...]) -> StoredTensor:
    """A tensor that is in no file; its name says what it is made of, and it begins where that does."""
    end = source.begin + prod(shape) * dtype.size_bytes
    return StoredTensor(f"{source.name} ({role}, made at load)", dtype, shape, source.file, source.begin, end)
