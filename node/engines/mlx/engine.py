"""The MLX engine: a stage of an `mlx-lm` model behind the Engine protocol.

Rows of one step that bring the same number of tokens share a forward; decode rows all do. What this module owns is
the order of things: check, build, let the device begin, and wait for it once.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from cluster.errors import AtCapacity, ModelError, RequestError
from cluster.models.checkpoint import open_checkpoint
from cluster.rewinding import EXACT, Rewind
from cluster.steps import Boundary, Row
from cluster.types import Backend, SequenceId
from node.engine import Capacity, Finish, Logits, Progress, StageSpec
from node.engines.mlx.arguments import read_arguments
from node.engines.mlx.cache import KvCache
from node.engines.mlx.device import nothing_kept, open_device
from node.engines.mlx.forwards import Loaded, begin, boundary_of, build, let_finish, logits_of, wait_for
from node.engines.mlx.rehearsal import rehearse
from node.engines.mlx.tensors import MLX_DTYPES, check_inputs
from node.engines.mlx.weights import load_slice


class MlxEngine:
    """See `node.engine.Engine`. MLX chooses its threads itself; `StageSpec.threads` has no effect."""

    def __init__(self) -> None:
        self._loaded: Loaded | None = None

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
        self._loaded = Loaded(spec, device, sliced, cache, weight_bytes)

    def step(self, rows: Sequence[Row], inputs: Boundary | None) -> Boundary | Logits:
        return self.begin(rows, inputs)()

    def begin(self, rows: Sequence[Row], inputs: Boundary | None) -> Finish:
        loaded = self._require()
        with mx.stream(loaded.device):
            let_finish(loaded, rows)
            _check(loaded, rows, inputs)
            try:
                forwards = build(loaded, rows, inputs)
                begin(loaded, forwards)
            finally:
                loaded.cache.reconcile()
        loaded.unfinished.append(forwards)

        def finish() -> Boundary | Logits:
            loaded.unfinished.remove(forwards)
            with mx.stream(loaded.device):
                wait_for(loaded, forwards)
                if lost := [row.seq for row in rows if loaded.cache.length(row.seq) < row.end]:
                    raise RuntimeError(f"what sequences {lost} held was lost in another step")
                return logits_of(loaded, rows, forwards) if loaded.spec.is_last else boundary_of(loaded, rows, forwards)

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

    def _require(self) -> Loaded:
        assert self._loaded is not None, "the engine is not loaded, or closed"
        return self._loaded


def _check(loaded: Loaded, rows: Sequence[Row], inputs: Boundary | None) -> None:
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
