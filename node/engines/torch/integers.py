"""Reading AWQ, GPTQ and compressed-tensors matrices into the form that stays in memory.

Which bits mean what is `node.engines.torch.repack`; here their tensors are told apart, and biases that stand for
nothing are left out. Knows no modules.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import torch

from cluster.errors import ModelError
from cluster.models.checkpoint import StoredTensor
from cluster.models.formats import Packing, Quantization
from cluster.models.matrices import Matrix, Role
from node.engines.torch.packed import Affine
from node.engines.torch.repack import Affine as Words
from node.engines.torch.repack import from_awq, from_gptq, from_pack_quantized

Read = Callable[[StoredTensor], torch.Tensor]
"""Gives a stored tensor's values, on the device."""


def read_integers(matrix: Matrix, stated: Quantization, read: Read) -> tuple[Affine, torch.Tensor | None]:
    """The matrix, and the input that each of its packed columns belongs to; None where they are in order."""
    used = set(matrix.used)
    parts = {role: read(tensor) for role, tensor in matrix.tensors.items() if tensor in used}
    try:
        words = _words(matrix, parts, stated)
    except ModelError as error:
        raise ModelError(f"{matrix.name!r}: {error}") from error
    codes = words.words.view(torch.uint8)
    return Affine(codes, words.scales, words.biases, matrix.width.bits), words.inputs


def _words(matrix: Matrix, parts: dict[Role, torch.Tensor], stated: Quantization) -> Words:
    values, scales, order = parts[Role.VALUES], parts[Role.SCALES], parts.get(Role.ORDER)
    bits, reordered = matrix.width.bits, stated.reordered
    match matrix.packing:
        case Packing.AWQ:
            return from_awq(values, parts[Role.ZEROS], scales)
        case Packing.GPTQ:
            return from_gptq(
                values,
                parts[Role.ZEROS],
                scales,
                order,
                bits=bits,
                symmetric=stated.symmetric,
                zeros_are_one_less=stated.zeros_are_one_less,
                reordered=reordered,
            )
        case _:
            return from_pack_quantized(values, scales, parts.get(Role.ZEROS), order, bits=bits, reordered=reordered)


def take_out_biases(
    matrices: dict[str, Matrix], local_name: Callable[[str], str], parameters: Container[str]
) -> list[Matrix]:
    """AutoGPTQ writes a bias beside every matrix, zero where the model has none."""
    strays = [name for name in matrices if name.endswith(".bias") and local_name(name) not in parameters]
    return [matrices.pop(name) for name in strays]


def confirm_zero(strays: list[Matrix], read: Read) -> None:
    """Nothing was left out that means something."""
    for matrix in strays:
        if bool(read(matrix.values).any()):
            raise ModelError(f"{matrix.name!r} is not zero, and the model has no such bias; use another version of it")
