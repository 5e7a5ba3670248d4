"""A checkpoint's tensors as the matrices that a model computes with, whatever their format.

Owns: which stored tensors make one matrix, told by their names (`.scales` beside `.weight`), and its shape as if it
were not packed. Reads no values. How values are unpacked is the engines' business.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from cluster.errors import ModelError
from cluster.models.checkpoint import StoredTensor
from cluster.models.formats import MLX_MODES, PACKED_IN_MEMORY, READERS, Packing, Quantization, Width
from cluster.models.integer_shapes import INTEGER_PACKINGS, mlx_computes, pair_bytes, unpacked_shape
from cluster.models.layout import canonical_name
from cluster.types import Backend, DType

_WORD_BITS = 32
_FLOATING = frozenset({DType.F32, DType.F16, DType.BF16})


class Role(enum.StrEnum):
    """What a stored tensor is to its matrix."""

    VALUES = "values"  # the numbers themselves, or their codes
    SCALES = "scales"
    BIASES = "biases"  # added to scaled codes
    ZEROS = "zeros"  # subtracted from codes
    ORDER = "order"  # the group of each column
    SHAPE = "shape"  # what the matrix is unpacked; beside the codes since these may be padded
    INPUTS = "inputs"  # how a publisher's kernels round activations; nothing is computed with it here


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix, vector or stack of matrices that a model computes with."""

    name: str  # as the unpacked tensor would be called
    packing: Packing
    shape: tuple[int, ...]  # [..., outputs, inputs] where it is packed
    width: Width  # bits of an element and columns that share a scale; 0 columns: not told by the format
    tensors: Mapping[Role, StoredTensor]
    symmetric: bool = False  # of integers: every zero is half the range
    reordered: bool = False  # of integers: the columns of a group lie anywhere

    @property
    def values(self) -> StoredTensor:
        return self.tensors[Role.VALUES]

    @property
    def dtype(self) -> DType:
        """The type of its numbers; where these are codes, that of what scales them."""
        if self.packing is Packing.NONE or Role.SCALES not in self.tensors:
            return self.values.dtype
        return self.tensors[Role.SCALES].dtype

    @property
    def readers(self) -> frozenset[Backend]:
        """The engines that compute with it exactly."""
        readers = READERS[self.packing]
        if self.packing in INTEGER_PACKINGS and not mlx_computes(self.name, self.width.group or self.shape[-1]):
            return readers - {Backend.MLX}
        # mlx-lm takes it apart, which it cannot but by packing the parts anew: other numbers than the file's.
        is_packed_expansion = self.packing in MLX_MODES and self.name.endswith("kv_b_proj.weight")
        return readers - {Backend.MLX} if is_packed_expansion else readers

    @property
    def used(self) -> tuple[StoredTensor, ...]:
        """What an engine reads of it."""
        return tuple(tensor for role, tensor in self.tensors.items() if role not in (Role.INPUTS, Role.SHAPE))

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    def resident_bytes(self, backend: Backend, dtype: DType) -> int:
        """In the memory of an engine that computes in `dtype`."""
        if backend in PACKED_IN_MEMORY[self.packing]:
            if self.packing in INTEGER_PACKINGS:
                group = self.width.group or self.shape[-1]
                pairs = (
                    prod(self.shape)
                    // group
                    * pair_bytes(self.tensors[Role.SCALES].dtype, group, backend, dtype, symmetric=self.symmetric)
                )
                order = self.tensors[Role.ORDER].size_bytes if self.reordered else 0
                return self.values.size_bytes + pairs + order
            return sum(tensor.size_bytes for tensor in self.used)
        return prod(self.shape) * dtype.size_bytes


@dataclass(frozen=True, slots=True)
class _Naming:
    """How the tensors of one matrix are called; endings of their names."""

    values: str
    logical: str
    others: Mapping[str, Role]


_MLX = _Naming(".weight", ".weight", {".scales": Role.SCALES, ".biases": Role.BIASES})
_BLOCKS = _Naming("_blocks", "", {"_scales": Role.SCALES})
_EIGHT_BITS = _Naming(
    ".weight",
    ".weight",
    {
        ".weight_scale_inv": Role.SCALES,
        ".weight_scale": Role.SCALES,
        ".input_scale": Role.INPUTS,
        ".activation_scale": Role.INPUTS,
    },
)
_QWEIGHT = _Naming(".qweight", ".weight", {".scales": Role.SCALES, ".qzeros": Role.ZEROS, ".g_idx": Role.ORDER})
_COMPRESSED = _Naming(
    ".weight_packed",
    ".weight",
    {
        ".weight_scale": Role.SCALES,
        ".weight_zero_point": Role.ZEROS,
        ".weight_shape": Role.SHAPE,
        ".weight_g_idx": Role.ORDER,
    },
)


def read_matrices(tensors: Iterable[StoredTensor], stated: Quantization | None, where: str) -> dict[str, Matrix]:
    """The matrices that `tensors` make, by name. Every tensor belongs to exactly one."""
    by_name = {tensor.name: tensor for tensor in tensors}
    packed, taken = [], set()
    for tensor in by_name.values():
        naming = _naming(tensor, by_name)
        if naming is not None:
            found = _gather(tensor, naming, by_name)
            taken |= {member.name for member in found.values()}
            packed.append(_matrix(_stem(tensor, naming) + naming.logical, found, naming, stated, where))
    plain = (tensor for tensor in by_name.values() if tensor.name not in taken)
    matrices: dict[str, Matrix] = {}
    for matrix in (*map(_plain, plain), *packed):
        if matrix.name in matrices:
            raise ModelError(f"{where}: {matrix.name!r} is stored twice, packed in two ways; download the model again")
        matrices[matrix.name] = matrix
    return matrices


def readers_of(matrices: Iterable[Matrix]) -> frozenset[Backend]:
    """The engines that compute with every one of them."""
    return frozenset(Backend).intersection(*(matrix.readers for matrix in matrices))


def _plain(tensor: StoredTensor) -> Matrix:
    return Matrix(tensor.name, Packing.NONE, tensor.shape, Width(8 * tensor.dtype.size_bytes, 0), {Role.VALUES: tensor})


def _naming(tensor: StoredTensor, by_name: Mapping[str, StoredTensor]) -> _Naming | None:
    """How the matrix is called whose codes `tensor` holds; None when it holds none."""
    for naming in (_QWEIGHT, _COMPRESSED):
        if tensor.name.endswith(naming.values):
            return naming
    if tensor.name.endswith("_blocks") and f"{tensor.name.removesuffix('_blocks')}_scales" in by_name:
        return _BLOCKS
    if not tensor.name.endswith(".weight"):
        return None
    if tensor.dtype is DType.F8_E4M3:
        return _EIGHT_BITS
    stem = tensor.name.removesuffix(".weight")
    return _MLX if tensor.dtype is DType.U32 and f"{stem}.scales" in by_name else None


def _stem(tensor: StoredTensor, naming: _Naming) -> str:
    return tensor.name.removesuffix(naming.values)


def _gather(tensor: StoredTensor, naming: _Naming, by_name: Mapping[str, StoredTensor]) -> dict[Role, StoredTensor]:
    found = {Role.VALUES: tensor}
    for ending, role in naming.others.items():
        other = by_name.get(_stem(tensor, naming) + ending)
        if other is not None:
            found.setdefault(role, other)
    return found


def _matrix(
    name: str, found: Mapping[Role, StoredTensor], naming: _Naming, stated: Quantization | None, where: str
) -> Matrix:
    values = found[Role.VALUES]
    if stated is None:
        raise ModelError(f"{where}: {values.name!r} is packed, but config.json states no quantization; download again")
    if Role.SCALES not in found:
        raise ModelError(f"{where}: {values.name!r} is packed, but its scales are missing; download the model again")
    if len(values.shape) < 2 or 0 in values.shape:
        raise ModelError(f"{where}: expected codes of a matrix as {values.name!r}, found shape {list(values.shape)}")
    *rows, columns = values.shape
    scales = found[Role.SCALES]
    is_integers = naming in (_QWEIGHT, _COMPRESSED)  # whose scales are checked with them
    # A byte is an exponent in MLX's floats; beside eight-bit floats no publisher has said what it would be.
    numbers = _FLOATING if naming is _EIGHT_BITS else _FLOATING | {DType.U8}
    if not is_integers and (0 in scales.shape or scales.dtype not in numbers):
        raise ModelError(
            f"{where}: expected numbers that scale {values.name!r}, found {scales.dtype} of shape {list(scales.shape)}"
        )
    if naming is _MLX:
        packing, width = _of_mlx(name, found, stated, where)
        shape = (*rows, columns * _WORD_BITS // width.bits)
    elif naming is _BLOCKS:
        if values.shape != (*scales.shape, 16) or values.dtype is not DType.U8 or scales.dtype is not DType.U8:
            raise ModelError(
                f"{where}: expected 16 bytes for each scale in {values.name!r}, found {list(values.shape)}"
            )
        packing, width, shape = Packing.MXFP4, Width(4, 32), (*scales.shape[:-1], 32 * scales.shape[-1])
    elif naming is _EIGHT_BITS:
        packing, width, shape = Packing.FP8, Width(8, 0), values.shape
    else:
        if (naming is _COMPRESSED) is not (stated.kind is Packing.INTEGERS):
            raise ModelError(f"{where}: config.json states {stated.kind}, but there is {values.name!r}; download again")
        zeros, order = found.get(Role.ZEROS), found.get(Role.ORDER)
        shape = unpacked_shape(stated, values, scales, zeros, order, where)
        symmetric = zeros is None or (stated.symmetric and stated.kind is Packing.GPTQ)
        reordered = order is not None and stated.reordered
        return Matrix(name, stated.kind, shape, stated.width, found, symmetric, reordered)
    return Matrix(name, packing, shape, width, found)


def _of_mlx(name: str, found: Mapping[Role, StoredTensor], stated: Quantization, where: str) -> tuple[Packing, Width]:
    """Bits times columns of a group follow from the shapes; what is stated says which is which."""
    values, scales = found[Role.VALUES], found[Role.SCALES]
    words, groups = values.shape[-1], scales.shape[-1] if scales.shape else 1
    if scales.shape[:-1] != values.shape[:-1] or words * _WORD_BITS % groups:
        raise ModelError(
            f"{where}: the codes of {name!r} have shape {list(values.shape)}, its scales {list(scales.shape)}, "
            "which do not fit together; download the model again"
        )
    group_bits = words * _WORD_BITS // groups
    if Role.BIASES not in found:
        for packing, width in _FLOATS.items():
            if scales.dtype is DType.U8 and width.bits * width.group == group_bits:
                return packing, width
        raise ModelError(f"{where}: {name!r} is packed in a way that Potluck does not know; use another version")
    if found[Role.BIASES].shape != scales.shape or {found[Role.BIASES].dtype, scales.dtype} - _FLOATING:
        raise ModelError(f"{where}: the scales and the biases of {name!r} are not alike; download the model again")
    width = stated.overrides.get(canonical_name(name), stated.width)
    # The defaults need not hold for a matrix that is not named; recipes vary the bits sooner than the groups.
    candidates = (
        width,
        Width(group_bits // max(1, width.group), width.group),
        Width(width.bits, group_bits // width.bits),
    )
    for candidate in candidates:
        if candidate.bits * candidate.group == group_bits and 1 <= candidate.bits <= 8:
            return Packing.AFFINE, candidate
    raise ModelError(
        f"{where}: config.json states {width.bits} bits and groups of {width.group} for {name!r}, but a scale goes "
        f"with {group_bits} bits of codes; download the model again"
    )


_FLOATS = {Packing.MXFP4: Width(4, 32), Packing.MXFP8: Width(8, 32), Packing.NVFP4: Width(4, 16)}
"""MLX's packings that have no settings; each with another number of bits for a scale."""
