"""Packed matrices that MLX's own modules would not multiply exactly.

MLX multiplies in the widest type of its arguments and answers in it: with scales that the model's type cannot hold, in
float32. These modules round the answer to the type of their input, as the unpacked matrix would. And columns may be
packed in an order of their own, in which these modules take their input. Knows nothing of formats.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear


class ExactLinear(nn.QuantizedLinear):
    """A matrix; `inputs` tells the input of each packed column."""

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
    """A stack of experts; `inputs` has a row for each."""

    def __init__(self, original: QuantizedSwitchLinear, *, has_order: bool) -> None:
        columns, experts = original.input_dims, original.num_experts
        shape = (columns, original.output_dims, experts)
        super().__init__(*shape, "bias" in original, original.group_size, original.bits)
        if has_order:
            self.inputs = mx.broadcast_to(mx.arange(columns, dtype=mx.uint32), (experts, columns))
        self.freeze()

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        arranged = x
        if "inputs" in self:  # x is [..., 1, columns], the same for all experts of a token or one for each
            order = self["inputs"][indices][..., None, :]
            arranged = mx.take_along_axis(mx.broadcast_to(x, order.shape), order, axis=-1)
        return super().__call__(arranged, indices, sorted_indices).astype(x.dtype)
