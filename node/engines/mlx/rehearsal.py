"""A first token, right after the load, that nobody asked for.

MLX knows the shape and type of every result before it computes anything, so whatever does not fit together is
found without computing. Then it is computed once, because not every device has every kernel (the CPU build
multiplies experts in float32 only): a model is refused when it is loaded, not when a request meets it.
"""

from __future__ import annotations

import mlx.core as mx

from cluster.errors import ModelError
from node.engine import StageSpec
from node.engines.mlx.lane import KvShape, LayerShape, StateShape
from node.engines.mlx.positions import LayerKind, Positions, StateCache, UnownedCache
from node.engines.mlx.slicing import Piece, SlicedModel
from node.engines.mlx.tensors import MLX_DTYPES


class _Recorder(UnownedCache):
    """An owned layer's cache that only notes what it is given."""

    def __init__(self, positions: Positions, window: int | None) -> None:
        super().__init__(positions, window)
        self.shapes: list[KvShape] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if keys.dtype != values.dtype or keys.shape[:3] != values.shape[:3]:
            raise ValueError(f"keys {keys.dtype}{keys.shape} and values {values.dtype}{values.shape} differ")
        self.shapes.append(KvShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, self._window))
        return keys, values


def rehearse(sliced: SlicedModel, spec: StageSpec) -> tuple[LayerShape, ...]:
    """What each owned layer caches; ModelError when the slice does not take or give what the plan says."""
    dtypes = [MLX_DTYPES[tensor.dtype] for tensor in spec.boundary]
    passed = [((1, 1, *tensor.shape), dtype) for tensor, dtype in zip(spec.boundary, dtypes, strict=True)]
    positions = Positions([0], 1, 1)
    kept = [layer for layer in spec.layers if not sliced.kinds[layer].shares]
    recorders = [_recorder(positions, sliced.kinds[layer]) for layer in kept]
    entering = () if spec.is_first else tuple(mx.zeros(shape, dtype) for shape, dtype in passed)
    piece = Piece(mx.zeros((1, 1), mx.int32), entering, drawing=(0,))
    try:
        outputs = sliced.forward(piece, sliced.caches(positions, recorders))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ModelError(f"layers {spec.layers} cannot be computed on their own: {error}") from error
    found = [(tuple(output.shape), output.dtype) for output in outputs]
    expected = [((1, sliced.vocab_size), found[0][1])] if spec.is_last else passed
    if found != expected:
        raise ModelError(f"layers {spec.layers} give {found}; the plan says {expected}")
    try:
        mx.eval(*outputs)
    except RuntimeError as error:
        where = f"in {spec.boundary[0].dtype} on {spec.device}"
        raise ModelError(
            f"MLX cannot compute layers {spec.layers} {where}: {error}; give them to another device or engine"
        ) from error
    return tuple(_shape(layer, sliced.kinds[layer], recorder) for layer, recorder in zip(kept, recorders, strict=True))


def _recorder(positions: Positions, kind: LayerKind) -> _Recorder | StateCache:
    return StateCache([None] * kind.states) if kind.states else _Recorder(positions, kind.window)


def _shape(layer: int, kind: LayerKind, recorder: _Recorder | StateCache) -> LayerShape:
    if isinstance(recorder, _Recorder):
        if len(recorder.shapes) != 1:
            raise ModelError(f"layer {layer} does not keep keys and values once")
        return recorder.shapes[0]
    arrays = [array for array in recorder.arrays if array.shape[0] == 1]
    if len(arrays) != kind.states:
        raise ModelError(f"layer {layer} does not keep one state for each row")
    return StateShape(tuple((tuple(array.shape[1:]), array.dtype) for array in arrays))
