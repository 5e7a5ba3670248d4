"""The MLX engine: a stage of an `mlx-lm` model behind the Engine protocol.

Rows of one step that bring the same number of tokens share a forward; decode rows all do. What this module owns is
the order of things: check, build, evaluate once, and only then let the new positions count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import mlx.core as mx
import numpy as np

from cluster.errors import AtCapacity, ModelError, RequestError
from cluster.models.checkpoint import open_checkpoint
from cluster.rewinding import EXACT, Rewind
from cluster.steps import Boundary, Row
from cluster.types import Backend, SequenceId
from node.engine import Capacity, Finish, Logits, Progress, StageSpec
from node.engines.mlx.arguments import read_arguments
from node.engines.mlx.cache import KvCache
from node.engines.mlx.device import nothing_kept, open_device
from node.engines.mlx.lane import Span
from node.engines.mlx.positions import Positions, owned
from node.engines.mlx.rehearsal import rehearse
from node.engines.mlx.slicing import Piece, SlicedModel
from node.engines.mlx.tensors import (
    MLX_DTYPES,
    Bits,
    as_bits,
    check_inputs,
    from_bits,
    host_bits,
    new_bits,
    read_bits,
    to_host,
)
from node.engines.mlx.weights import load_slice


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a load leaves behind."""

    spec: StageSpec
    device: mx.Device
    sliced: SlicedModel
    cache: KvCache
    weight_bytes: int
    unfinished: list[list[_Forward]] = field(default_factory=list)  # steps, in the order in which they began


@dataclass(frozen=True, slots=True)
class _Forward:
    """One span's share of a step: built, not computed."""

    span: Span
    rows: tuple[int, ...]  # of the step, in the span's order
    tokens: int
    drawing: tuple[int, ...]  # of these, in the step's order
    kept: list[tuple[mx.array, ...]]  # what the span's lane is to hold, by owned layer, until it does
    results: tuple[mx.array, ...]  # the boundary's bits [rows, tokens, ...]; float32 logits on the last stage


class MlxEngine:
    """See `node.engine.Engine`. MLX chooses its threads itself; `StageSpec.threads` has no effect."""

    def __init__(self) -> None:
        self._loaded: _Loaded | None = None

    @property
    def backend(self) -> Backend:
        return Backend.MLX

    @property
    def rewind(self) -> Rewind:
        return EXACT if self._loaded is None else self._loaded.sliced.rewind

    def load(self, spec: StageSpec, progress: Progress) -> None:
        assert self._loaded is None, "an engine is loaded once"
        if len({tensor.dtype for tensor in spec.boundary} & MLX_DTYPES.keys()) != 1:
            raise ModelError(f"the MLX engine passes on tensors of one of F32, F16 or BF16, not {spec.boundary}")
        checkpoint = open_checkpoint(spec.folder)
        arguments = read_arguments(checkpoint)
        if arguments.shape.layer_count != spec.layer_count:
            raise ModelError(f"the plan has {spec.layer_count} layers, config.json {arguments.shape.layer_count}")
        shape = arguments.shape
        expected = [(shape.hidden_size,), *([(shape.layer_count, shape.input_width)] if shape.input_width else [])]
        if [tensor.shape for tensor in spec.boundary] != expected:
            raise ModelError(
                f"the plan's boundary is {[tensor.shape for tensor in spec.boundary]}, config.json says {expected}"
            )
        exact_tokens = arguments.rotation.exact_tokens
        if exact_tokens is not None and spec.context_tokens > exact_tokens:
            raise ModelError(
                f"the MLX engine rotates sequences of this model exactly up to {exact_tokens} tokens; the plan allows "
                f"{spec.context_tokens}; ask for a context of {exact_tokens}"
            )
        device = open_device(spec.device)
        with mx.stream(device), nothing_kept():
            sliced, weight_bytes = load_slice(checkpoint, arguments, spec, progress)
            cache = KvCache(
                rehearse(sliced, spec),
                kv_tokens=spec.kv_tokens,
                context_tokens=spec.context_tokens,
                padding_bytes_max=weight_bytes,
                rewind=sliced.rewind,
            )
        self._loaded = _Loaded(spec, device, sliced, cache, weight_bytes)

    def step(self, rows: Sequence[Row], inputs: Boundary | None) -> Boundary | Logits:
        return self.begin(rows, inputs)()

    def begin(self, rows: Sequence[Row], inputs: Boundary | None) -> Finish:
        loaded = self._require()
        with mx.stream(loaded.device):
            _let_finish(loaded, rows)
            _check(loaded, rows, inputs)
            try:
                forwards = _build(loaded, rows, inputs)
                _begin(loaded, forwards)
            finally:
                loaded.cache.reconcile()
        loaded.unfinished.append(forwards)

        def finish() -> Boundary | Logits:
            loaded.unfinished.remove(forwards)
            with mx.stream(loaded.device):
                _await(loaded, forwards)
                if lost := [row.seq for row in rows if loaded.cache.length(row.seq) < row.end]:
                    raise RuntimeError(f"what sequences {lost} held was lost in another step")
                return _logits(loaded, rows, forwards) if loaded.spec.is_last else _boundary(loaded, rows, forwards)

        return finish

    def fork(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        loaded = self._require()
        with mx.stream(loaded.device):
            return loaded.cache.fork(src, dst, length)

    def move(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        loaded = self._require()
        with mx.stream(loaded.device):
            return loaded.cache.move(src, dst, length)

    def trim(self, seq: SequenceId, length: int) -> int:
        loaded = self._require()
        with mx.stream(loaded.device):
            return loaded.cache.trim(seq, length)

    def drop(self, seq: SequenceId) -> None:
        self._require().cache.drop(seq)

    def length(self, seq: SequenceId) -> int:
        return self._require().cache.length(seq)

    def capacity(self) -> Capacity:
        loaded = self._require()
        cache = loaded.cache
        return Capacity(cache.kv_tokens, cache.used_tokens, len(cache), loaded.weight_bytes, cache.allocated_bytes)

    def close(self) -> None:
        self._loaded = None
        mx.clear_cache()

    def _require(self) -> _Loaded:
        assert self._loaded is not None, "the engine is not loaded, or closed"
        return self._loaded


def _check(loaded: _Loaded, rows: Sequence[Row], inputs: Boundary | None) -> None:
    """Raise before anything is computed: the cache has to stay as it is when a step is refused."""
    spec, cache = loaded.spec, loaded.cache
    if len({row.seq for row in rows}) != len(rows):
        raise ValueError("a sequence has two rows in one step")
    for row in rows:
        if not row.tokens or row.start != cache.length(row.seq):
            raise ValueError(
                f"sequence {row.seq} has {cache.length(row.seq)} cached positions; "
                f"found a row of {len(row.tokens)} tokens from {row.start}"
            )
        if row.end > spec.context_tokens:
            raise RequestError(f"sequence {row.seq} reaches {row.end} tokens; the plan allows {spec.context_tokens}")
        if row.adapter is not None:
            raise ValueError(f"adapter {row.adapter} is not supported by the MLX engine")
        if spec.is_first and not 0 <= min(row.tokens) <= max(row.tokens) < loaded.sliced.vocab_size:
            raise ValueError(f"sequence {row.seq} has a token id outside the vocabulary of {loaded.sliced.vocab_size}")
    tokens = sum(len(row.tokens) for row in rows)
    if cache.used_tokens + tokens > cache.kv_tokens:
        raise AtCapacity(
            f"the cache holds {cache.used_tokens} of {cache.kv_tokens} positions; {tokens} more do not fit",
            retry_after_s=1.0,
        )
    check_inputs(inputs, () if spec.is_first else spec.boundary, tokens)


def _build(loaded: _Loaded, rows: Sequence[Row], inputs: Boundary | None) -> list[_Forward]:
    """Every span's forward as a graph. What the cache holds has not changed yet."""
    index_of = {row.seq: index for index, row in enumerate(rows)}
    begins = _begins(rows)
    entering = [host_bits(tensor) for tensor in inputs or ()]
    spans = loaded.cache.spans_for({row.seq: len(row.tokens) for row in rows})
    return [_forward(loaded, span, index_of, rows, begins, entering) for span in spans]


def _forward(
    loaded: _Loaded,
    span: Span,
    index_of: Mapping[SequenceId, int],
    rows: Sequence[Row],
    begins: Sequence[int],
    entering: Sequence[Bits],
) -> _Forward:
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
    return _Forward(span, live, tokens, drawing, [cache.arrays for cache in caches], results)


def _let_finish(loaded: _Loaded, rows: Sequence[Row]) -> None:
    """MLX writes in place only where nothing on the device still reads: so no lane is in two steps at a time."""
    for forwards in loaded.unfinished:
        if any(row.seq in forward.span.lane.rows for forward in forwards for row in rows):
            _await(loaded, forwards)


def _begin(loaded: _Loaded, forwards: Sequence[_Forward]) -> None:
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


def _await(loaded: _Loaded, forwards: Sequence[_Forward]) -> None:
    with _lost_if_it_fails(loaded, forwards):
        mx.eval([_wanted(loaded, forward) for forward in forwards])


def _wanted(loaded: _Loaded, forward: _Forward) -> list[object]:
    """What a step has to leave: no logits where nobody draws."""
    return [forward.span.lane.arrays, *(forward.results if forward.drawing or not loaded.spec.is_last else ())]


@contextmanager
def _lost_if_it_fails(loaded: _Loaded, forwards: Sequence[_Forward]) -> Iterator[None]:
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


def _boundary(loaded: _Loaded, rows: Sequence[Row], forwards: Sequence[_Forward]) -> Boundary:
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


def _logits(loaded: _Loaded, rows: Sequence[Row], forwards: Sequence[_Forward]) -> Logits:
    """The forwards' logits in the order of the rows that draw; not copied where one forward has them all."""
    drawing = [forward for forward in forwards if forward.drawing]
    if len(drawing) == 1:
        return np.asarray(drawing[0].results[0])
    order = {index: place for place, index in enumerate(i for i, row in enumerate(rows) if row.draw is not None)}
    logits = np.empty((len(order), loaded.sliced.vocab_size), np.float32)
    for forward in drawing:
        logits[[order[index] for index in forward.drawing]] = np.asarray(forward.results[0])
    return logits
