"""How each packed format lies in files, and the form that it takes in memory.

Nothing is rounded on the way: codes and scales are moved as they are. Shapes of codes were checked against the
configuration before (`places`); those of what scales them are checked here. Knows no modules.
"""

from __future__ import annotations

from math import ceil

import torch

from cluster.errors import ModelError
from cluster.models.formats import Packing, Quantization
from cluster.models.integer_shapes import INTEGER_PACKINGS
from cluster.models.matrices import Matrix, Role
from node.engines.torch.integers import Read, read_integers
from node.engines.torch.packed import Affine, Fp8, Mxfp4, Packed
from node.engines.torch.places import affine_bits

_BYTE = torch.uint8


def read_packed(
    matrix: Matrix, shape: tuple[int, ...], quantization: Quantization | None, read: Read
) -> tuple[list[Packed], torch.Tensor | None]:
    """The matrix of this unpacked shape, or each of the stack; and the input that each packed column belongs to, None
    where they are in order."""
    if matrix.packing in INTEGER_PACKINGS and quantization is not None:
        affine, order = read_integers(matrix, quantization, read)
        return [affine], order
    return _read_stack(matrix, shape, quantization, read), None


def _read_stack(matrix: Matrix, shape: tuple[int, ...], quantization: Quantization | None, read: Read) -> list[Packed]:
    _check_scales(matrix, shape, quantization)
    tensors = {role: read(tensor) for role, tensor in matrix.tensors.items() if role is not Role.INPUTS}
    if len(shape) == 2:
        tensors = {role: tensor[None] for role, tensor in tensors.items()}
    values, scales = tensors[Role.VALUES], tensors[Role.SCALES]
    match matrix.packing:
        case Packing.AFFINE:
            bits = affine_bits(matrix, shape[-1])
            assert bits is not None, "places have checked it"
            biases = tensors[Role.BIASES]
            return [Affine(values[i].view(_BYTE), scales[i], biases[i], bits) for i in range(len(values))]
        case Packing.MXFP4:
            # In gpt-oss' own layout a row is cut into blocks of 16 bytes.
            codes = values.flatten(-2) if values.ndim == 4 else values.view(_BYTE)
            return [Mxfp4(codes[i], scales[i]) for i in range(len(values))]
        case Packing.FP8:
            return [_fp8(values[i], scales[i], quantization) for i in range(len(values))]
        case _:
            raise _unread(matrix)


def _fp8(codes: torch.Tensor, scales: torch.Tensor, quantization: Quantization | None) -> Fp8:
    rows, columns = codes.shape
    if scales.numel() == 1:
        return Fp8(codes, scales.view(1, 1), block=columns, height=rows)
    if quantization is not None and quantization.block is not None:
        height, width = quantization.block
        return Fp8(codes, scales, block=width, height=height)
    return Fp8(codes, scales.view(rows, 1), block=columns)


def _check_scales(matrix: Matrix, shape: tuple[int, ...], quantization: Quantization | None) -> None:
    """Before anything is read: the scales are as many as the shape asks for."""
    found = {role: tensor.shape for role, tensor in matrix.tensors.items()}
    *outer, rows, columns = shape
    fits = bool(outer) == (len(shape) == 3)
    match matrix.packing:
        case Packing.AFFINE:
            # How many groups there are is the file's to say; `affine_bits` has checked that they are whole.
            fits = found[Role.BIASES] == found[Role.SCALES] and found[Role.SCALES][:-1] == shape[:-1]
        case Packing.MXFP4:
            fits = found[Role.SCALES] == (*outer, rows, columns // 32)
        case Packing.FP8:
            allowed: set[tuple[int, ...]] = {(), (1,), (1, 1)}
            if quantization is not None and quantization.block is not None:
                height, width = quantization.block
                allowed.add((ceil(rows / height), ceil(columns / width)))
            else:
                allowed |= {(rows,), (rows, 1)}
            fits = not outer and found[Role.SCALES] in allowed
        case _:
            raise _unread(matrix)
    if not fits or len(shape) not in (2, 3):
        raise ModelError(
            f"{matrix.name!r} has shape {shape} and is packed as {matrix.packing}, but its scales have shape "
            f"{found[Role.SCALES]}; download the model again"
        )


def _unread(matrix: Matrix) -> ModelError:
    return ModelError(f"{matrix.name!r} is packed as {matrix.packing}, which the torch engine does not unpack")
