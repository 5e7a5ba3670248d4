"""TorchEngine: a slice of a `transformers` model behind the Engine protocol, on a CPU, a CUDA device or `mps`.

Owns what happens between rows coming in and activations or logits going out. A step is checked completely
before it starts, and its positions count only once its result is in host memory, so a failed step changes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cluster.errors import AtCapacity, ModelError, RequestError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import owned_tensors
from cluster.rewinding import EXACT, Rewind
from cluster.steps import Boundary, Row
from cluster.types import Backend, SequenceId
from node.engine import Capacity, Logits, Progress, StageSpec
from node.engines.torch.attention import Batch, Span
from node.engines.torch.captured import DecodeSteps, Means, decoding_rows, means_of
from node.engines.torch.kernels import MAPPED_FROM_BYTES, keep_few_kernels
from node.engines.torch.kv import KvCache
from node.engines.torch.ragged import DecodeRows
from node.engines.torch.shortcuts import take_shortcuts
from node.engines.torch.slicing import Passing, SlicedModel, build_slice
from node.engines.torch.tensors import TORCH_DTYPES, check_inputs, device_from, from_host, to_host
from node.engines.torch.trial import is_right
from node.engines.torch.weights import load_weights
from node.host_allocator import give_back_when_freed


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What exists from a load to the close."""

    spec: StageSpec
    sliced: SlicedModel
    cache: KvCache
    device: torch.device
    weight_bytes: int
    decoding: DecodeSteps | None = None  # None: rows of one token are computed as all others


class TorchEngine:
    """See `node.engine.Engine`. `means`: how steps of one token a row are computed; None: as the device allows."""

    def __init__(self, means: Means | None = None) -> None:
        self._means = means
        self._stage: _Loaded | None = None

    @property
    def backend(self) -> Backend:
        return Backend.TORCH

    @property
    def rewind(self) -> Rewind:
        return EXACT if self._stage is None else self._stage.sliced.rewind

    @torch.inference_mode()
    def load(self, spec: StageSpec, progress: Progress) -> None:
        assert self._stage is None, "an engine is loaded once"
        device = device_from(spec.device)
        if device.type == "cpu":
            give_back_when_freed(MAPPED_FROM_BYTES)
            keep_few_kernels()
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        checkpoint = open_checkpoint(spec.folder)
        sliced = build_slice(checkpoint, spec, _compute_dtype(spec), device)
        found, expected = [tensor.shape for tensor in spec.boundary], sliced.boundary_shapes(spec.layer_count)
        if found != expected:
            raise ModelError(f"the plan's boundary is {found}; config.json says {expected}")
        tensors = owned_tensors(checkpoint, spec.layers, spec.layer_count)
        weight_bytes = load_weights(sliced, checkpoint, spec, tensors, device, progress)
        take_shortcuts(sliced.model)
        cache = KvCache(sliced.windows, spec.kv_tokens, spec.context_tokens, sliced.rewind)
        stage = _Loaded(spec, sliced, cache, device, weight_bytes)
        _rehearse(stage)
        means = self._means or means_of(device)
        self._stage = stage if means is None else replace(stage, decoding=_decoding(stage, means))

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], inputs: Boundary | None) -> Boundary | Logits:
        stage = self._loaded()
        _check_rows(stage, rows)
        tokens = sum(len(row.tokens) for row in rows)
        check_inputs(inputs, () if stage.sliced.is_first else stage.spec.boundary, tokens)
        spans = _spans(stage, rows)
        compute = _compute if stage.decoding is None else _compute_at_once
        result = compute(stage, rows, inputs, spans)
        for row, span in zip(rows, spans, strict=True):
            stage.cache.commit(row.seq, span.cache, row.end, span.states)
        return result

    @torch.inference_mode()
    def fork(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        return self._loaded().cache.fork(src, dst, length)

    def move(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        return self._loaded().cache.move(src, dst, length)

    def trim(self, seq: SequenceId, length: int) -> int:
        return self._loaded().cache.trim(seq, length)

    def drop(self, seq: SequenceId) -> None:
        self._loaded().cache.drop(seq)

    def length(self, seq: SequenceId) -> int:
        return self._loaded().cache.length(seq)

    def capacity(self) -> Capacity:
        stage = self._loaded()
        return Capacity(
            kv_tokens=stage.cache.kv_tokens,
            kv_tokens_used=stage.cache.used_tokens,
            sequences=len(stage.cache),
            weight_bytes=stage.weight_bytes,
            kv_bytes=stage.cache.allocated_bytes,
        )

    def close(self) -> None:
        stage, self._stage = self._stage, None
        if stage is not None and stage.decoding is not None:
            stage.decoding.close()
        if stage is not None and stage.device.type == "cuda":
            del stage
            torch.cuda.empty_cache()

    def _loaded(self) -> _Loaded:
        if self._stage is None:
            raise RuntimeError("the engine holds no stage: load one first, and use none after close")
        return self._stage


def _compute_dtype(spec: StageSpec) -> torch.dtype:
    """The boundary's type, which the plan took from the checkpoint: every stage computes in the same one."""
    dtypes = {tensor.dtype for tensor in spec.boundary}
    if len(dtypes) != 1 or not dtypes <= TORCH_DTYPES.keys():
        raise ModelError(
            f"the torch engine computes in one of {', '.join(TORCH_DTYPES)}; "
            f"this model needs {', '.join(f'{tensor.name} as {tensor.dtype}' for tensor in spec.boundary)}"
        )
    return TORCH_DTYPES[spec.boundary[0].dtype]


def _check_rows(stage: _Loaded, rows: Sequence[Row]) -> None:
    """Raise before anything is computed: the cache has to stay as it is when a step is refused."""
    if len({row.seq for row in rows}) != len(rows):
        raise ValueError("a sequence may have one row in a step; found two")
    vocabulary = stage.sliced.vocabulary
    for row in rows:
        length = stage.cache.length(row.seq)
        if row.start != length:
            raise ValueError(f"sequence {row.seq} has {length} cached positions; its row starts at {row.start}")
        if not row.tokens or min(row.tokens) < 0 or max(row.tokens) >= vocabulary:
            raise ValueError(f"sequence {row.seq}: expected one or more token ids below {vocabulary}")
        if row.adapter is not None:
            raise ValueError(f"sequence {row.seq} asks for adapter {row.adapter}; the torch engine has none")
        if row.end > stage.spec.context_tokens:
            raise RequestError(
                f"sequence {row.seq} reaches {row.end} tokens; the plan allows {stage.spec.context_tokens}"
            )
    used = stage.cache.used_tokens + sum(len(row.tokens) for row in rows)
    if used > stage.cache.kv_tokens:
        raise AtCapacity(
            f"the step needs {used} cached positions; there are {stage.cache.kv_tokens}", retry_after_s=1.0
        )


def _spans(stage: _Loaded, rows: Sequence[Row]) -> tuple[Span, ...]:
    spans, begin = [], 0
    for row in rows:
        end = begin + len(row.tokens)
        spans.append(Span(begin, end, row.start, stage.cache.find_or_new(row.seq)))
        begin = end
    return tuple(spans)


def _compute_at_once(
    stage: _Loaded, rows: Sequence[Row], inputs: Boundary | None, spans: Sequence[Span]
) -> Boundary | Logits:
    """Rows of one token together, and what follows them one by one."""
    decoding, count = stage.decoding, decoding_rows(rows)
    assert decoding is not None
    places = [span.cache.places(span.start + 1) for span in spans[:count]]
    if 0 < count == len(rows):
        return decoding.compute(rows, inputs, places)
    with decoding.on_device():
        return _compute(stage, rows, inputs, spans, decoding.beside(rows[:count], places) if count else None)


def _compute(
    stage: _Loaded,
    rows: Sequence[Row],
    inputs: Boundary | None,
    spans: Sequence[Span],
    decode: DecodeRows | None = None,
) -> Boundary | Logits:
    """`decode`: the first of the rows, where these are computed at once."""
    sliced, spec, device = stage.sliced, stage.spec, stage.device
    batch = Batch(tuple(spans[decode.count if decode else 0 :]), decode=decode)
    keep = [span.end - 1 for row, span in zip(rows, spans, strict=True) if row.draw is not None]
    if rows:
        positions = torch.tensor([p for row in rows for p in range(row.start, row.end)], device=device)
        if inputs is None:
            entering = sliced.enter(torch.tensor([token for row in rows for token in row.tokens], device=device))
        else:
            entering = Passing(*(from_host(tensor, device) for tensor in inputs))
        if sliced.is_last and keep:
            logits = sliced.logits(entering, positions, batch, torch.tensor(keep, device=device))
            return np.ascontiguousarray(logits.float().cpu().numpy())
        leaving = sliced.hidden_states(entering, positions, batch)
    else:
        leaving = _nothing(spec, 0, device)
    if sliced.is_last:
        return np.empty((0, sliced.vocabulary), dtype=np.float32)
    return tuple(to_host(tensor, plan) for tensor, plan in zip(leaving.tensors, spec.boundary, strict=True))


def _nothing(spec: StageSpec, tokens: int, device: torch.device) -> Passing:
    """What a boundary carries for so many tokens, all of it zeros."""
    shapes = (((tokens, *tensor.shape), TORCH_DTYPES[tensor.dtype]) for tensor in spec.boundary)
    return Passing(*(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes))


def _rehearse(stage: _Loaded) -> None:
    """Compute one token and forget it: a layer whose attention asks for something unknown, or keeps its state
    anywhere but in our cache, must be found at load, because later it would only be silently wrong."""
    sliced, layer_count = stage.sliced, len(stage.spec.layers)
    batch = Batch((Span(0, 1, 0, stage.cache.new()),))
    positions = torch.zeros(1, dtype=torch.int64, device=stage.device)
    entering = sliced.enter(positions) if sliced.is_first else _nothing(stage.spec, 1, stage.device)
    if sliced.is_last:
        sliced.logits(entering, positions, batch, positions)
    else:
        sliced.hidden_states(entering, positions, batch)
    if batch.attended != list(range(layer_count)):
        raise ModelError(
            f"the torch engine computes layers that attend once each, in order; of {layer_count} layers of "
            f"{type(sliced.model).__name__} these did: {batch.attended}"
        )


def _decoding(stage: _Loaded, means: Means) -> DecodeSteps | None:
    """Steps of one token a row by `means`, if these compute the same."""
    steps = DecodeSteps(stage.sliced, stage.spec, stage.device, means)

    def eagerly(row: Row, inputs: Boundary | None, span: Span) -> Boundary | Logits:
        return _compute(stage, [row], inputs, [span])

    return steps if is_right(steps, eagerly, stage.cache.new, stage.spec) else None
