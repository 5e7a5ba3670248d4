"""Stages on the MLX engine compute exactly what the whole model computes, and broken ones are noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from cluster.errors import ModelError
from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.mlx.positions import LayerCache, Positions, UnownedCache
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.oracle.mlx_reference import MLX_TOLERANCE, WholeMlxModel, mlx_reference, whole_mlx_model
from tests.oracle.pipelines import greedy, load_pipeline, row, run_prefill, run_step, stage_specs
from tests.oracle.reference import Reference, WholeModel, assert_same, random_prompt

CUTS = ((), (3,), (2, 4))  # one, two and three stages of six layers

Checkpoints = Callable[[str], Path]


def mlx_pipeline(folder: Path, cuts: Sequence[int] = (), **limits: int) -> list[Engine]:
    specs = stage_specs(folder, cuts, **limits)
    return load_pipeline([MlxEngine] * len(specs), specs)


def assert_equal(ids: Sequence[int], logits: npt.NDArray[np.float32], reference: Reference) -> None:
    """The check that mutants have to fail."""
    assert_same(ids, logits, reference, tolerance=MLX_TOLERANCE)


def assert_ragged_batch_equal(engines: Sequence[Engine], expected: Sequence[Reference], chunk: int) -> None:
    """Sequences arrive one after another; prefill chunks of some share steps with decode rows of others."""
    drawn: list[list[int]] = [[] for _ in expected]
    logits: list[list[npt.NDArray[np.float32]]] = [[] for _ in expected]
    done = [0] * len(expected)  # positions computed of each sequence
    tick = 0
    while any(len(ids) < len(answer.ids) for ids, answer in zip(drawn, expected, strict=True)):
        rows, whose = [], []
        for seq, answer in enumerate(expected):
            tokens = [*answer.prompt, *drawn[seq]]
            if tick < 2 * seq or len(drawn[seq]) == len(answer.ids):
                continue
            end = min(len(tokens), done[seq] + chunk)
            rows.append(row(seq, done[seq], tokens[done[seq] : end], draw=end == len(tokens)))
            done[seq] = end
            if end == len(tokens):
                whose.append(seq)
        for seq, last in zip(whose, run_step(engines, rows), strict=True):
            logits[seq].append(last)
            drawn[seq].append(int(last.argmax()))
        tick += 1
    for seq, answer in enumerate(expected):
        assert_equal(drawn[seq], np.stack(logits[seq]), answer)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_and_logits_equal_the_whole_model(
    family: str, cuts: tuple[int, ...], checkpoint: Checkpoints
) -> None:
    expected = mlx_reference(checkpoint(family))
    engines = mlx_pipeline(checkpoint(family), cuts)
    assert_equal(*greedy(engines, expected.prompt, len(expected.ids)), expected)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_prefill_cut_gives_the_same_logits(family: str, cuts: tuple[int, ...], checkpoint: Checkpoints) -> None:
    expected = mlx_reference(checkpoint(family))
    engines = mlx_pipeline(checkpoint(family), cuts)
    for cut in range(1, len(expected.prompt)):
        assert_equal(*greedy(engines, expected.prompt, 3, chunks=(cut,), seq=cut), expected)
        for engine in engines:
            engine.drop(row(cut, 0, ()).seq)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_one_token_at_a_time_equals_the_whole_model(family: str, checkpoint: Checkpoints) -> None:
    expected = mlx_reference(checkpoint(family))
    engines = mlx_pipeline(checkpoint(family), (2, 4))
    cuts = range(1, len(expected.prompt))
    assert_equal(*greedy(engines, expected.prompt, len(expected.ids), chunks=cuts), expected)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_ragged_batch_do_not_see_each_other(
    family: str, cuts: tuple[int, ...], checkpoint: Checkpoints
) -> None:
    expected = [mlx_reference(checkpoint(family), prompt_tokens) for prompt_tokens in (5, 23, 24, 40)]
    assert_ragged_batch_equal(mlx_pipeline(checkpoint(family), cuts), expected, chunk=9)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_chunks_of_equal_length_at_different_positions_share_a_forward(
    family: str, checkpoint: Checkpoints
) -> None:
    prompts = [random_prompt(40, seed) for seed in range(3)]
    engines = mlx_pipeline(checkpoint(family), (3,), kv_tokens=4096)
    run_step(engines, [row(seq, 0, prompt[: 7 * seq + 1], draw=False) for seq, prompt in enumerate(prompts)])
    logits = run_step(engines, [row(seq, 7 * seq + 1, p[7 * seq + 1 :][:20]) for seq, p in enumerate(prompts)])
    for seq, prompt in enumerate(prompts):
        expected = whole_mlx_model(checkpoint(family)).logits(prompt[: 7 * seq + 21])[-1]
        np.testing.assert_allclose(logits[seq], expected, rtol=0, atol=MLX_TOLERANCE)


@pytest.mark.parametrize("prompt_tokens", [15, 16, 17, 33, 100])
def test_windows_end_where_the_whole_model_ends_them(prompt_tokens: int, checkpoint: Checkpoints) -> None:
    """Prompts around one window of 16, two, and many, in chunks that begin inside and outside of the window."""
    prompt = random_prompt(prompt_tokens, seed=prompt_tokens)
    expected = whole_mlx_model(checkpoint("gemma3")).logits(prompt)[-1]
    engines = mlx_pipeline(checkpoint("gemma3"), (2, 4))
    for seq, cuts in enumerate([(), (1,), (14,), (prompt_tokens - 1,), (7, 9, 13)]):
        np.testing.assert_allclose(
            run_prefill(engines, prompt, cuts, seq=seq), expected, rtol=0, atol=MLX_TOLERANCE, err_msg=str(cuts)
        )


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"qwen3_moe"}))
def test_bfloat16_stages_round_no_more_than_the_whole_model(family: str, tmp_path: Path) -> None:
    """Both are compared with the same weights in float32: a stage boundary must not add an error of its own."""
    folder = make_checkpoint(family, tmp_path, dtype="bfloat16")
    prompt = random_prompt(40, seed=3)
    exact = WholeModel(folder).in_float32().logits(prompt)[-1]
    whole_error = np.abs(WholeMlxModel(folder).logits(prompt)[-1] - exact).mean()
    stages_error = np.abs(run_prefill(mlx_pipeline(folder, (2, 4)), prompt, (13,)) - exact).mean()
    assert 0 < stages_error < 1.5 * whole_error


def test_what_the_device_has_no_kernel_for_is_refused_at_load(tmp_path: Path) -> None:
    """MLX's CPU build multiplies experts in float32 only."""
    folder = make_checkpoint("qwen3_moe", tmp_path, layers=1, dtype="bfloat16")
    with pytest.raises(ModelError, match="BF16 on cpu"):
        mlx_pipeline(folder)


ROPES: dict[str, dict[str, object]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize(("family", "rope"), [*product(("llama", "qwen3"), ROPES), ("gemma3", "linear")])
def test_scaled_rotations_equal_transformers(family: str, rope: str, tmp_path: Path) -> None:
    """The whole model by transformers is the judge: it alone reads its own configuration without our help."""
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 30_000.0, **ROPES[rope]}
    if family == "gemma3":
        local = {"rope_type": "default", "rope_theta": 7_000.0}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    folder = make_checkpoint(family, tmp_path, layers=3, rope_parameters=parameters)
    prompt = random_prompt(90, seed=5)
    expected = WholeModel(folder).logits(prompt)[-1]
    np.testing.assert_allclose(run_prefill(mlx_pipeline(folder, (1,)), prompt, (50,)), expected, rtol=0, atol=5e-4)


def _position_off_by_one(monkeypatch: pytest.MonkeyPatch, engines: list[Engine]) -> None:
    def late(self: UnownedCache) -> object:
        offset = self._positions.offset
        return offset + (offset > 40)

    monkeypatch.setattr(UnownedCache, "offset", property(late))


def _lost_window(monkeypatch: pytest.MonkeyPatch, engines: list[Engine]) -> None:
    mask = Positions._mask
    monkeypatch.setattr(Positions, "oldest", lambda self, window: 0)
    monkeypatch.setattr(Positions, "_mask", lambda self, window, in_chunks: mask(self, None, in_chunks))


def _swapped_layers(monkeypatch: pytest.MonkeyPatch, engines: list[Engine]) -> None:
    layers = engines[-1]._loaded.sliced.model.model.layers  # type: ignore[attr-defined]
    layers[3], layers[4] = layers[4], layers[3]


def _stale_kv(monkeypatch: pytest.MonkeyPatch, engines: list[Engine]) -> None:
    """One step's keys and values come too late: its position still holds those of the token before."""
    written = LayerCache._written

    def late(self: LayerCache, store: mx.array, new: mx.array) -> mx.array:
        return written(self, store, store[:, :, 40:41] if self._positions.starts == (41,) else new)

    monkeypatch.setattr(LayerCache, "_written", late)


MUTANTS = [
    *product((_position_off_by_one, _swapped_layers, _stale_kv), FAMILIES),
    (_lost_window, "gemma3"),  # the only family with windows
]


@pytest.mark.parametrize(("mutate", "family"), MUTANTS)
def test_mutants_fail_the_check(
    mutate: Callable[[pytest.MonkeyPatch, list[Engine]], None],
    family: str,
    checkpoint: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = mlx_reference(checkpoint(family))
    engines = mlx_pipeline(checkpoint(family), (3,))
    mutate(monkeypatch, engines)
    with pytest.raises(AssertionError):
        assert_equal(*greedy(engines, expected.prompt, len(expected.ids)), expected)


def _mask_of_the_longest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Positions._mask

    def same(self: Positions, window: int | None, in_chunks: bool) -> mx.array:
        return mask(Positions([max(self.starts)] * len(self.starts), self.tokens, self.capacity), window, in_chunks)

    monkeypatch.setattr(Positions, "_mask", same)


def _offset_of_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnownedCache, "offset", property(lambda self: self._positions.starts[0]))


@pytest.mark.parametrize("mutate", [_mask_of_the_longest_row, _offset_of_the_first_row])
def test_batching_mutants_fail_the_ragged_check(
    mutate: Callable[[pytest.MonkeyPatch], None], checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [mlx_reference(checkpoint("llama"), prompt_tokens) for prompt_tokens in (5, 23, 24, 40)]
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_ragged_batch_equal(mlx_pipeline(checkpoint("llama")), expected, chunk=9)
