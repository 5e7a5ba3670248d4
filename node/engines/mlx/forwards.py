"""What becomes of a step's rows on the MLX engine: forwards that are built, begun, waited for and read.

Each company of sequences has a forward of its own; all of a step are evaluated at once. Nothing that a stage holds
changes before they are begun. Checks nothing: that is the engine's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import mlx.core as mx
import numpy as np

from cluster.steps import Boundary, Row
from cluster.types import SequenceId
from node.engine import Logits, StageSpec
from node.engines.mlx.cache import KvCache
from node.engines.mlx.lane import Span
from node.engines.mlx.positions import Positions, owned
from node.engines.mlx.slicing import Piece, SlicedModel
from node.engines.mlx.tensors import Bits, as_bits, from_bits, host_bits, new_bits, read_bits, to_host


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load leaves behind."""

    spec: StageSpec
    device: mx.Device
    sliced: SlicedModel
    cache: KvCache
    weight_bytes: int
    unfinished: list[list[Forward]] = field(default_factory=list)  # steps, in the order in which they began


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """One span's share of a step: built, not computed."""

    span: Span
    rows: tuple[int, ...]  # of the step, in the span's order
    tokens: int
    drawing: tuple[int, ...]  # of these, in the step's order
    kept: list[tuple[mx.array, ...]]  # what the span's lane is to hold, by owned layer, until it does
    results: tuple[mx.array, ...]  # the boundary's bits [rows, tokens, ...]; float32 logits on the last stage


def build(loaded: Loaded, rows: Sequence[Row], inputs: Boundary | None) -> list[Forward]:
    """Every span's forward as a graph. What the cache holds has not changed yet."""
    index_of = {row.seq: index for index, row in enumerate(rows)}
    begins = _begins(rows)
    entering = [host_bits(tensor) for tensor in inputs or ()]
    spans = loaded.cache.spans_for({row.seq: len(row.tokens) for row in rows})
    return [_forward(loaded, span, index_of, rows, begins, entering) for span in spans]


def _forward(
    loaded: Loaded,
    span: Span,
    index_of: Mapping[SequenceId, int],
    rows: Sequence[Row],
    begins: Sequence[int],
    entering: Sequence[Bits],
) -> Forward:
    sliced, spec = loaded.sliced, loaded.spec
    live = tuple(index_of[seq] for _, seq in span.seated)
    # What is computed for nobody is another row's tokens once more: numbers like any other.
    indices = [live[0] if seq is None else index_of[seq] for seq in span.seqs]
    tokens = len(rows[live[0]].tokens)
    positions = Positions(
        [rows[index].start for index in indices], tokens, span.lane.capacity, first=span.first, live=span.live
    )
    kept = [layer for layer in spec.layers if not sliced.kinds[layer].shares]
    caches = tuple(owned(positions, sliced.kinds[layer], span.lane.stored(slot)) for slot, layer in enumerate(kept))
    drawing = tuple(sorted(index for index in live if rows[index].draw is not None))
    tensors = []
    for bits, tensor in zip(entering, spec.boundary, strict=bool(entering)):
        parts = [bits[begins[index] : begins[index] + tokens] for index in indices]
        tensors.append(from_bits(np.stack(parts), tensor.dtype))
    ids = mx.array([rows[index].tokens for index in indices], mx.int32)
    piece = Piece(ids, tuple(tensors), tuple(span.live[live.index(index)] for index in drawing))
    outputs = sliced.forward(piece, sliced.caches(positions, caches))
    results = tuple(output.astype(mx.float32) if spec.is_last else as_bits(output) for output in outputs)
    return Forward(span, live, tokens, drawing, [cache.arrays for cache in caches], results)


def let_finish(loaded: Loaded, rows: Sequence[Row]) -> None:
    """MLX writes in place only where nothing on the device still reads: so no lane is in two steps at a time."""
    for forwards in loaded.unfinished:
        if any(row.seq in forward.span.lane.rows for forward in forwards for row in rows):
            wait_for(loaded, forwards)


def begin(loaded: Loaded, forwards: Sequence[Forward]) -> None:
    """Let the device evaluate the step, and its positions count."""
    for forward in forwards:
        for slot, arrays in enumerate(forward.kept):
            forward.span.lane.store(slot, *arrays)
        forward.kept.clear()  # else nothing could be written in place
    with _lost_if_it_fails(loaded, forwards):
        snapshots = [loaded.cache.snapshots(forward.span, forward.tokens) for forward in forwards]
        mx.async_eval([_wanted(loaded, forward) for forward in forwards], snapshots)
    for forward, left in zip(forwards, snapshots, strict=True):
        loaded.cache.commit(forward.span, forward.tokens, left)


def wait_for(loaded: Loaded, forwards: Sequence[Forward]) -> None:
    with _lost_if_it_fails(loaded, forwards):
        mx.eval([_wanted(loaded, forward) for forward in forwards])


def _wanted(loaded: Loaded, forward: Forward) -> list[object]:
    """What a step has to leave: no logits where nobody draws."""
    return [forward.span.lane.arrays, *(forward.results if forward.drawing or not loaded.spec.is_last else ())]


@contextmanager
def _lost_if_it_fails(loaded: Loaded, forwards: Sequence[Forward]) -> Iterator[None]:
    """When the device fails half-way through writing, what these lanes hold cannot be trusted any more."""
    try:
        yield
    except BaseException:
        for forward in forwards:
            for seq in forward.span.lane.live:
                loaded.cache.drop(seq)
        raise


def _begins(rows: Sequence[Row]) -> list[int]:
    """Where each row's tokens begin in the packed tensors; one more at the end for their number."""
    return list(accumulate((len(row.tokens) for row in rows), initial=0))


def boundary_of(loaded: Loaded, rows: Sequence[Row], forwards: Sequence[Forward]) -> Boundary:
    """What the forwards pass on, packed in the order of the step's rows."""
    begins = _begins(rows)
    boundary = []
    for place, tensor in enumerate(loaded.spec.boundary):
        packed = new_bits((begins[-1], *tensor.shape), tensor.dtype)
        for forward in forwards:
            bits = read_bits(forward.results[place])
            for index, row in zip(forward.rows, forward.span.live, strict=True):
                packed[begins[index] : begins[index + 1]] = bits[row]
        boundary.append(to_host(packed, tensor.dtype))
    return tuple(boundary)


def logits_of(loaded: Loaded, rows: Sequence[Row], forwards: Sequence[Forward]) -> Logits:
    """The forwards' logits in the order of the rows that draw; not copied where one forward has them all."""
    drawing = [forward for forward in forwards if forward.drawing]
    if len(drawing) == 1:
        return np.asarray(drawing[0].results[0])
    order = {index: place for place, index in enumerate(i for i, row in enumerate(rows) if row.draw is not None)}
    logits = np.empty((len(order), loaded.sliced.vocab_size), np.float32)
    for forward in drawing:
        logits[[order[index] for index in forward.drawing]] = np.asarray(forward.results[0])
    return logits
