"""Which matrices of a checkpoint are read some rows at a time, and as what.

Those that are converted while they are read (packed for `--bits`, or unpacked from eight-bit floats), and experts,
which mlx-lm copies into stacks or out of them. All others are read by MLX, each straight into the memory where it
stays. Only matrices whose rows mlx-lm leaves whole can be read like this: the same as `--bits` packs, and what expands
latents, which it takes apart by heads and turns. Experts of integers are `integers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import mlx.core as mx

from cluster.models.family import Family
from cluster.models.formats import Packing, Quantization
from cluster.models.integer_shapes import INTEGER_PACKINGS
from cluster.models.layout import canonical_name, is_expert, within_layer
from cluster.models.matrices import Matrix
from cluster.models.quantising import inputs_last, is_packed_at_load, is_turned
from cluster.types import DType
from node.engines.mlx.eight_bits import unpacked, whole
from node.engines.mlx.quantising import Packed
from node.engines.mlx.sources import AsStored, Source
from node.engines.mlx.tensors import MLX_DTYPES

_EXPANDS_LATENTS: Final = "self_attn.kv_b_proj.weight"


def split_off(
    lazy: Mapping[str, mx.array],
    matrices: Iterable[Matrix],
    family: Family,
    *,
    stated: Quantization | None,
    bits: int | None,
    dtype: mx.Dtype,
) -> tuple[dict[str, mx.array], dict[str, Source]]:
    """The tensors that MLX reads, and those that are read by rows."""
    tensors, sources = dict(lazy), dict[str, Source]()
    for matrix in matrices:
        name, shape = canonical_name(matrix.name), inputs_last(matrix.name, matrix.shape, family)
        leaves_rows_whole = is_packed_at_load(matrix.name, shape, family)
        if matrix.packing is Packing.FP8:
            parts = {role: tensors.pop(canonical_name(tensor.name)) for role, tensor in matrix.tensors.items()}
            form = unpacked(parts, matrix, stated.block if stated else None, dtype)
            if len(shape) == 2 and (leaves_rows_whole or within_layer(matrix.name) == _EXPANDS_LATENTS):
                sources[name] = Source(matrix.values, form)
            else:
                tensors[name] = whole(parts, form)
        elif matrix.packing is Packing.NONE and leaves_rows_whole and _is_floating(matrix.dtype):
            turned = len(shape) == 3 and is_turned(matrix.name, family)
            if bits is not None:
                sources[name] = Source(matrix.values, Packed(shape[-1], bits, dtype), turned)
            elif is_expert(within_layer(matrix.name)) and (stated is None or stated.kind not in INTEGER_PACKINGS):
                sources[name] = Source(matrix.values, AsStored(shape[-1], MLX_DTYPES[matrix.dtype]), turned)
    return {name: array for name, array in tensors.items() if name not in sources}, sources


def _is_floating(dtype: DType) -> bool:
    return dtype in MLX_DTYPES
