"""Llama 4 on both engines: chunks, layers without rotation, queries that grow, experts in some layers.

transformers is the judge. mlx-lm is not: it norms queries and keys with a constant of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx
import torch

from cluster.errors import ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from node.engine import Engine
from node.engines.mlx import chunked as mlx_chunked
from node.engines.mlx import positions
from node.engines.mlx.engine import MlxEngine
from node.engines.torch import attention
from node.engines.torch import chunked as torch_chunked
from node.engines.torch.engine import TorchEngine
from tests.checkpoints import make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, load_pipeline, ragged, row, run_prefill, run_step, stage_specs
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, assert_same, random_prompt
from tests.oracle.test_torch_load import copied

Checkpoints = Callable[[str], Path]
References = Callable[..., Reference]
Make = Callable[[], Engine]
ENGINES = pytest.mark.parametrize("make", [TorchEngine, MlxEngine])


def pipeline(make: Make, folder: Path, cuts: tuple[int, ...] = (3,)) -> list[Engine]:
    return load_pipeline([make] * (len(cuts) + 1), stage_specs(folder, cuts))


def assert_equal(found: tuple[list[int], Any], expected: Reference) -> None:
    """The check that mutants have to fail."""
    assert_same(*found, expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("cuts", [(), (3,), (2, 4)])
def test_greedy_text_and_logits_equal_the_whole_model_on_mlx(
    cuts: tuple[int, ...], checkpoint: Checkpoints, reference: References
) -> None:
    expected = reference("llama4")
    assert_equal(greedy(pipeline(MlxEngine, checkpoint("llama4"), cuts), expected.prompt, LAST_TOKENS), expected)


@ENGINES
def test_prefill_cuts_around_chunks_give_the_same_logits(
    make: Make, checkpoint: Checkpoints, reference: References
) -> None:
    expected = reference("llama4")
    engines = pipeline(make, checkpoint("llama4"))
    for seq, cuts in enumerate([(1,), (15,), (16,), (17, 32, 33), (39,), tuple(range(1, 40))]):
        assert_equal(greedy(engines, expected.prompt, 2, chunks=cuts, seq=seq), expected)


@ENGINES
def test_rows_of_a_ragged_batch_do_not_see_each_other(
    make: Make, checkpoint: Checkpoints, reference: References
) -> None:
    """Some before the end of their first chunk, some far beyond."""
    expected = [reference("llama4", prompt_tokens) for prompt_tokens in (5, 23, 40)]
    engines = pipeline(make, checkpoint("llama4"), (2, 4))
    found = ragged(engines, [answer.prompt for answer in expected], LAST_TOKENS)
    for one, answer in zip(found, expected, strict=True):
        assert_equal(one, answer)


@ENGINES
def test_a_sequence_cut_back_into_an_earlier_chunk_continues_like_a_fresh_one(
    make: Make, checkpoint: Checkpoints, whole_model: Callable[[str], WholeModel]
) -> None:
    prompt, other = random_prompt(50, seed=5), random_prompt(8, seed=6)
    (engine,) = engines = pipeline(make, checkpoint("llama4"), ())
    run_prefill(engines, prompt)
    assert engine.trim(row(1, 0, ()).seq, 30) == 30
    found = run_step(engines, [row(1, 30, other)])[0]
    expected = whole_model("llama4").logits(prompt[:30] + other)[-1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


VARIANTS: dict[str, dict[str, object]] = {
    "as Scout": {
        "interleave_moe_layer_step": 1,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 50_000.0,
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
        },
    },
    "without norms of queries and keys": {"use_qk_norm": False},
    "without growing queries": {"attn_temperature_tuning": False},
    "with a large constant in its norms": {"rms_norm_eps": 0.05},
}


@pytest.mark.parametrize("variant", VARIANTS)
@ENGINES
def test_every_variant_is_computed(make: Make, variant: str, tmp_path: Path) -> None:
    folder = make_checkpoint("llama4", tmp_path, **VARIANTS[variant])
    prompt = random_prompt(60, seed=3)
    found = run_prefill(pipeline(make, folder, (2, 4)), prompt, (13,))
    np.testing.assert_allclose(found, WholeModel(folder).logits(prompt)[-1], rtol=0, atol=TOLERANCE)


@ENGINES
def test_layers_in_chunks_keep_no_more_than_they_need(make: Make, checkpoint: Checkpoints) -> None:
    """Five of six; the other one keeps everything."""
    facts = read_facts(open_checkpoint(checkpoint("llama4")))
    assert [layer.kv_tokens_max is None for layer in facts.layers] == [False, False, False, True, False, False]
    (engine,) = engines = pipeline(make, checkpoint("llama4"), ())
    run_prefill(engines, random_prompt(400, seed=1), range(40, 400, 40))
    token_bytes = facts.layers[0].kv_bytes_per_token
    kept = sum(layer.kv_tokens_max or 512 for layer in facts.layers)
    assert engine.capacity().kv_bytes <= kept * token_bytes
    assert engine.capacity().kv_bytes < 6 * 400 * token_bytes / 2


def _windows_that_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = positions.Positions._mask
    monkeypatch.setattr(positions.Positions, "_mask", lambda self, window, in_chunks: mask(self, window, False))
    attend = attention._attend_sequence

    def slide(query: Any, keys: Any, values: Any, places: tuple[int, int], chunk: int, scoring: Any) -> torch.Tensor:
        first, start = places
        return attend(query, keys, values, start - first, replace(scoring, window=chunk))

    monkeypatch.setattr(attention, "_attend_chunks", slide)


def _positions_within_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers counts them without a cache, and mlx-lm for one row alone."""
    tuned = torch_chunked.tuned
    monkeypatch.setattr(torch_chunked, "tuned", lambda module, query, start: tuned(module, query, 0))
    lengths = mlx_chunked.ChunkedAttention._lengths
    monkeypatch.setattr(
        mlx_chunked.ChunkedAttention, "_lengths", lambda self, offset, tokens: lengths(self, mx.array(0), tokens)
    )


@pytest.mark.parametrize("mutate", [_windows_that_slide, _positions_within_the_step])
@ENGINES
def test_mutants_fail_the_check(
    make: Make,
    mutate: Callable[[pytest.MonkeyPatch], None],
    checkpoint: Checkpoints,
    reference: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = reference("llama4")
    engines = pipeline(make, checkpoint("llama4"))
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_equal(greedy(engines, expected.prompt, 8, chunks=(20,)), expected)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"no_rope_layers": [1, 0, 1, 1, 1, 1]}, "no_rope_layers"),
        ({"layer_types": ["chunked_attention"] * 6}, "layer_types"),
        ({"moe_layers": [0]}, "moe_layers"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok"),
        ({"interleave_moe_layer_step": 0}, "interleave_moe_layer_step"),
    ],
)
def test_what_mlx_lm_would_place_otherwise_is_refused(
    fields: dict[str, object], named: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = copied(checkpoint("llama4"), tmp_path, **fields)
    spec = replace(stage_specs(checkpoint("llama4"), ())[0], folder=folder)
    with pytest.raises(ModelError, match=named):
        MlxEngine().load(spec, lambda progress: None)
