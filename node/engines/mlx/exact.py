"""Packed matrices whose scales the model's own type cannot hold: MLX's modules, multiplying in float32.

MLX multiplies in the widest type of its arguments and answers in it. These modules round the answer to the type of
their input, as the unpacked matrix would. Knows nothing of formats.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear


class ExactLinear(nn.QuantizedLinear):
    """Besides: columns may be packed in an order of their own, which `inputs` then tells."""

    def __init__(self, original: nn.QuantizedLinear, *, has_order: bool) -> None:
        rows, words = original.weight.shape
        columns = words * 32 // original.bits
        super().__init__(columns, rows, "bias" in original, original.group_size, original.bits)
        if has_order:
            self.inputs = mx.arange(columns, dtype=mx.uint32)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        arranged = x[..., self["inputs"]] if "inputs" in self else x
        return super().__call__(arranged).astype(x.dtype)


class ExactSwitchLinear(QuantizedSwitchLinear):
    """A stack of experts."""

    def __init__(self, original: QuantizedSwitchLinear) -> None:
        shape = (original.input_dims, original.output_dims, original.num_experts)
        super().__init__(*shape, "bias" in original, original.group_size, original.bits)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        return super().__call__(x, indices, sorted_indices).astype(x.dtype)
