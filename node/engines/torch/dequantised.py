"""Packed checkpoints in full precision, for the reference of `potluck verify`: MLX's formats, AWQ, GPTQ,
compressed-tensors, eight-bit floats, and gpt-oss as it is published.

transformers reads these formats with libraries that Potluck does without, or not at all. Written from the formats'
definitions, value by value, and apart from the engine's unpacking, so that the two can disagree. Knows no modules.
"""

from __future__ import annotations

import torch
from safetensors import safe_open

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint
from cluster.models.formats import MLX_MODES, Packing, Quantization
from cluster.models.integer_shapes import INTEGER_PACKINGS
from cluster.models.layout import Unused, part_of
from cluster.models.matrices import Matrix, Role, read_matrices

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""What the lower three of a four-bit float's bits mean; the highest is the sign."""

_ROWS = 1024
"""Unpacked at once, so that codes as wide integers are never all of a matrix."""

_AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in an AWQ word each of eight neighbours lies, from its lowest four bits up."""


def dequantised(checkpoint: Checkpoint, stated: Quantization | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor that a text model computes with: packed ones unpacked in float32 and rounded once to `dtype`."""
    where = str(checkpoint.folder)
    used = [tensor for tensor in checkpoint.tensors.values() if not isinstance(part_of(tensor.name), Unused)]
    numbers: dict[str, torch.Tensor] = {}
    for matrix in read_matrices(used, stated, where).values():
        parts = {role: _read(checkpoint, tensor.name) for role, tensor in matrix.tensors.items()}
        if matrix.packing is Packing.NONE or stated is None:
            numbers[matrix.name] = parts[Role.VALUES]
        elif matrix.packing in MLX_MODES and parts[Role.VALUES].dtype is torch.uint32:
            numbers[matrix.name] = _of_mlx(matrix, parts, dtype, where)
        else:
            numbers[matrix.name] = _unpacked(matrix, parts, stated, where).to(dtype)
    return numbers


def _unpacked(matrix: Matrix, parts: dict[Role, torch.Tensor], stated: Quantization, where: str) -> torch.Tensor:
    match matrix.packing:
        case Packing.FP8:
            return _eight_bits(parts[Role.VALUES].float(), parts[Role.SCALES].float(), stated.block)
        case Packing.MXFP4:
            return _of_gpt_oss(parts[Role.VALUES], parts[Role.SCALES])
        case packing if packing in INTEGER_PACKINGS:
            return _numbers(matrix, parts, stated)
        case _:
            raise _unread(matrix, where)


def _of_mlx(matrix: Matrix, parts: dict[Role, torch.Tensor], dtype: torch.dtype, where: str) -> torch.Tensor:
    """[..., outputs, inputs]; some rows at a time."""
    words = parts[Role.VALUES].view(torch.int32)
    numbers = torch.empty((*words.shape[:-1], words.shape[-1] * 32 // matrix.width.bits), dtype=dtype)
    columns = [parts[role].flatten(0, -2) for role in (Role.SCALES, Role.BIASES) if role in parts]
    rows = zip(*(part.split(_ROWS) for part in (numbers.flatten(0, -2), words.flatten(0, -2), *columns)), strict=True)
    for target, packed, scales, *biases in rows:
        codes = _consecutive(packed, matrix.width.bits)
        groups = codes.unflatten(-1, (scales.shape[-1], -1))
        match matrix.packing:
            case Packing.AFFINE:
                scaled = groups.float() * scales.float()[..., None] + biases[0].float()[..., None]
            case Packing.MXFP4:
                scaled = _four_bits(groups, scales)
            case _:
                raise _unread(matrix, where)
        target.copy_(scaled.flatten(-2))
    return numbers


def _consecutive(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes that lie one behind the other from the lowest bit of the first word on; 32 of them fill whole words."""
    wide = (words.long() % (1 << 32)).unflatten(-1, (-1, bits))
    codes = []
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        code = wide[..., word] >> shift
        if shift + bits > 32:
            code = code | (wide[..., word + 1] << (32 - shift))
        codes.append(code % (1 << bits))
    return torch.stack(codes, dim=-1).flatten(-2)


def _eight_bits(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """Each number times its block's scale, its row's, or the matrix' own."""
    if scales.numel() == 1:
        return codes * scales.flatten()
    if block is None:
        return codes * scales.reshape(-1, 1)
    rows, columns = (torch.arange(count) // size for count, size in zip(codes.shape, block, strict=True))
    return codes * scales[rows][:, columns]


def _of_gpt_oss(blocks: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """[experts, outputs, blocks, 16 bytes] as [experts, inputs, outputs]: gpt-oss multiplies from the left."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
    return _four_bits(codes, exponents).flatten(-2).transpose(1, 2).contiguous()


def _four_bits(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """[..., groups, numbers] that share an exponent."""
    numbers = torch.where(codes < 8, _FP4[codes % 8], -_FP4[codes % 8])
    return torch.ldexp(numbers, exponents.int()[..., None] - 127)


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    with safe_open(checkpoint.folder / checkpoint.tensors[name].file, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _numbers(matrix: Matrix, parts: dict[Role, torch.Tensor], stated: Quantization) -> torch.Tensor:
    """(q - zero) * scale, [outputs, inputs]."""
    rows, columns = matrix.shape
    bits, half = matrix.width.bits, 1 << (matrix.width.bits - 1)
    words, scales, zeros = parts[Role.VALUES], parts[Role.SCALES].float(), parts.get(Role.ZEROS)
    match matrix.packing:
        case Packing.AWQ:
            q, z = _along(words, 1, 4, _AWQ_NIBBLE).T, _along(parts[Role.ZEROS], 1, 4, _AWQ_NIBBLE).T
            scales = scales.T
        case Packing.GPTQ:
            # Version 1 subtracted one from every zero with a borrow across the word.
            lifted = parts[Role.ZEROS].long() % (1 << 32)
            if stated.zeros_are_one_less:
                lifted = (lifted + (0x11111111 if bits == 4 else 0x01010101)) % (1 << 32)
            q, z, scales = _along(words, 0, bits).T, _along(lifted, 1, bits).T, scales.T
        case _:
            q = _along(words, 1, bits)
            z = torch.full_like(scales, half) if zeros is None else _along(zeros, 0, bits)[:rows]
    order = parts.get(Role.ORDER)
    if order is None or bool((order < 0).all()):
        order = torch.arange(columns) // (columns // scales.shape[1])
    group = order.long()
    return (q - z[:, group]).float() * scales[:, group]


def _along(words: torch.Tensor, axis: int, bits: int, places: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Each word as the integers that it holds, in its place along the axis."""
    per_word, wide = 32 // bits, words.long() % (1 << 32)
    parts = [(wide >> (bits * place)) % (1 << bits) for place in places[:per_word]]
    return torch.stack(parts, dim=axis + 1).flatten(axis, axis + 1)


def _unread(matrix: Matrix, where: str) -> ModelError:
    return ModelError(f"{where}: {matrix.name!r} is packed as {matrix.packing}, which has no reference by transformers")
