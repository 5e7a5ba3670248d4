"""What engines really take is at most what plans promise, and not far less: load, longest prefill, full batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx
import numpy as np
from mlx_lm.models import base

from cluster.placement import activations
from cluster.quantities import MIB
from cluster.types import Backend, LayerRange
from node.engines.mlx import attention
from node.engines.mlx.positions import Positions, UnownedCache
from tests.checkpoints import make_checkpoint
from tests.oracle.memory_edges import beyond, taken, warm_ups
from tests.oracle.memory_peaks import Run, measured

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8000,
}

WHOLE = [
    (Backend.TORCH, "llama", "float32", 2048, 2),
    (Backend.TORCH, "gemma2", "float32", 1024, 2),
    (Backend.TORCH, "qwen3_moe", "float32", 1024, 2),
    (Backend.MLX, "llama", "float32", 192, 2),
    (Backend.MLX, "gemma3", "float32", 192, 2),
]

LIBRARY_BYTES = 8 * MIB
"""Beside the stage itself: what libraries keep for their products, and kernels compiled for its shapes. It does not
grow with the model, and nodes leave it to their reserve."""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Backend], list[Path]]:
    @cache
    def make(backend: Backend) -> list[Path]:
        return warm_ups(backend, tmp_path_factory.mktemp("warm"))

    return make


@linux_only
@pytest.mark.parametrize(("backend", "family", "dtype", "context", "users"), WHOLE)
def test_the_peak_is_at_most_the_prediction_and_at_least_85_percent_of_it(
    backend: Backend,
    family: str,
    dtype: str,
    context: int,
    users: int,
    warm: Callable[[Backend], list[Path]],
    tmp_path: Path,
) -> None:
    layers = 6 if family == "gemma3" else 3
    more = {"moe_intermediate_size": 256, "intermediate_size": 512} if family == "qwen3_moe" else {}
    folder = make_checkpoint(family, tmp_path, layers=layers, dtype=dtype, **(SIZES | more))
    (found,) = measured(backend, warm(backend), [Run(folder, LayerRange(0, layers), context, users)])
    assert 0.85 * found["predicted"] <= found["peak"] <= found["predicted"] + LIBRARY_BYTES, found


@linux_only
@pytest.mark.parametrize(("backend", "count"), [(Backend.TORCH, 12), (Backend.MLX, 8)])
def test_no_plan_at_the_edge_runs_out_of_memory(
    backend: Backend, count: int, warm: Callable[[Backend], list[Path]], tmp_path: Path
) -> None:
    assert not beyond(taken(backend, range(count), warm(backend), tmp_path))


@pytest.mark.parametrize("mask", ["causal", "array", "rows"])
@pytest.mark.parametrize(("tokens", "positions"), [(40, 40), (40, 100), (7, 100)])
def test_attention_in_blocks_gives_what_one_call_gives(
    mask: str, tokens: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    queries, keys, values = (
        mx.array(rng.standard_normal((2, heads, count, 16)), mx.float32)
        for heads, count in ((4, tokens), (2, positions), (2, positions))
    )
    chosen: mx.array | str = "causal"
    if mask != "causal":
        rows = (1 if mask == "array" else 2, 1, tokens, positions)
        chosen = mx.array(rng.random(rows) < 0.7) | (mx.arange(positions) == 0)
    with mx.stream(mx.cpu):
        cache = UnownedCache(Positions([0, 0], tokens, positions), None)
        calls = []

        def counted(*args: mx.array, **kwargs: object) -> mx.array:
            calls.append(args[0].shape[2])
            return base.scaled_dot_product_attention(*args, **kwargs)

        monkeypatch.setattr(attention, "_THEIRS", counted)
        whole = attention.attend(queries, keys, values, cache, 0.25, chosen)
        monkeypatch.setattr(attention, "SCORES_MAX", 2 * 4 * positions * 9)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
        parts = attention.attend(queries, keys, values, cache, 0.25, chosen)
    assert calls == [tokens, *([9] * (tokens // 9)), *([tokens % 9] if tokens > 9 else [])] or tokens < 9
    np.testing.assert_allclose(np.array(parts), np.array(whole), rtol=0, atol=1e-6)


def test_both_sides_count_blocks_of_the_same_size() -> None:
    assert activations._HELD[Backend.MLX].scores == attention.SCORES_MAX
