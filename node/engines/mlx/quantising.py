"""Packing full-precision weights while they are read (`StageSpec.bits`): a `Form` of `sources`."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from cluster.models.quantising import GROUP
from node.engines.mlx.sources import Made


@dataclass(frozen=True, slots=True)
class Packed:
    """Codes, scales and biases of MLX's packed layers."""

    columns: int
    bits: int
    dtype: mx.Dtype  # that the model computes in

    @property
    def made(self) -> tuple[Made, ...]:
        groups = self.columns // GROUP
        return (
            Made("weight", self.columns * self.bits // 32, mx.uint32),
            Made("scales", groups, self.dtype),
            Made("biases", groups, self.dtype),
        )

    def convert(self, numbers: mx.array, first: int) -> tuple[mx.array, ...]:
        # On the processor whatever computes later: Metal rounds halves another way, and a layer must have the same
        # numbers on every machine that may hold it. Scales are what float32 makes them, rounded once.
        source = numbers if numbers.dtype == self.dtype else numbers.astype(mx.float32)
        codes, scales, biases = mx.quantize(source, group_size=GROUP, bits=self.bits, stream=mx.cpu)
        return codes, scales.astype(self.dtype), biases.astype(self.dtype)
