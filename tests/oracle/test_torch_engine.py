"""Stages on the torch engine compute exactly what the whole model computes, and broken ones are noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from node.engine import Engine
from node.engines.torch import attention
from node.engines.torch.engine import TorchEngine
from node.engines.torch.kv import SequenceCache
from node.engines.torch.slicing import SlicedModel
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, load_pipeline, ragged, row, run_prefill, stage_specs
from tests.oracle.reference import Reference, WholeModel, assert_same, check_reference, random_prompt

CUTS = ((), (3,), (2, 4))  # one, two and three stages of six layers

Checkpoints = Callable[[str], Path]
References = Callable[..., Reference]


def torch_pipeline(folder: Path, cuts: Sequence[int] = (), **limits: int) -> list[Engine]:
    specs = stage_specs(folder, cuts, **limits)
    return load_pipeline([TorchEngine] * len(specs), specs)


def assert_equal(ids: Sequence[int], logits: npt.NDArray[np.float32], reference: Reference) -> None:
    """The check that mutants have to fail."""
    assert_same(ids, logits, reference, tolerance=TOLERANCE)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_and_logits_equal_the_whole_model(
    family: str, cuts: tuple[int, ...], checkpoint: Checkpoints, reference: References
) -> None:
    expected = reference(family)
    engines = torch_pipeline(checkpoint(family), cuts)
    assert_equal(*greedy(engines, expected.prompt, len(expected.ids)), expected)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_prefill_cut_gives_the_same_logits(
    family: str, cuts: tuple[int, ...], checkpoint: Checkpoints, reference: References
) -> None:
    expected = reference(family)
    engines = torch_pipeline(checkpoint(family), cuts)
    for cut in range(1, len(expected.prompt)):
        assert_equal(*greedy(engines, expected.prompt, 3, chunks=(cut,), seq=cut), expected)
        for engine in engines:
            engine.drop(row(cut, 0, ()).seq)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_one_token_at_a_time_equals_the_whole_model(
    family: str, checkpoint: Checkpoints, reference: References
) -> None:
    expected = reference(family)
    engines = torch_pipeline(checkpoint(family), (2, 4))
    cuts = range(1, len(expected.prompt))
    assert_equal(*greedy(engines, expected.prompt, len(expected.ids), chunks=cuts), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_ragged_batch_do_not_see_each_other(
    family: str, checkpoint: Checkpoints, reference: References
) -> None:
    """Sequences arrive one after another; prefill chunks of some share steps with decode rows of others."""
    expected = [reference(family, prompt_tokens) for prompt_tokens in (5, 23, 40)]
    engines = torch_pipeline(checkpoint(family), (2, 4))
    found = ragged(engines, [answer.prompt for answer in expected], len(expected[0].ids))
    for (ids, logits), answer in zip(found, expected, strict=True):
        assert_equal(ids, logits, answer)


@pytest.mark.parametrize("prompt_tokens", [15, 16, 17, 33, 100])
def test_windows_end_where_the_whole_model_ends_them(
    prompt_tokens: int, checkpoint: Checkpoints, whole_model: Callable[[str], WholeModel]
) -> None:
    """Prompts around one window of 16, two, and many, in chunks that begin inside and outside of the window."""
    prompt = random_prompt(prompt_tokens, seed=prompt_tokens)
    expected = whole_model("gemma3").logits(prompt)[-1]
    engines = torch_pipeline(checkpoint("gemma3"), (2, 4))
    for seq, cuts in enumerate([(), (1,), (14,), (prompt_tokens - 1,), (7, 9, 13)]):
        np.testing.assert_allclose(
            run_prefill(engines, prompt, cuts, seq=seq), expected, rtol=0, atol=TOLERANCE, err_msg=str(cuts)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_long_prompts_are_attended_in_blocks(
    family: str, checkpoint: Checkpoints, whole_model: Callable[[str], WholeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERIES_MAX", 8)
    prompt = random_prompt(60, seed=1)
    engines = torch_pipeline(checkpoint(family))
    expected = whole_model(family).logits(prompt)[-1]
    np.testing.assert_allclose(run_prefill(engines, prompt, (21,)), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stages_round_like_the_whole_model(family: str, tmp_path: Path) -> None:
    """Their distance is small beside the rounding itself: what float32 makes of the same weights. A hidden size that
    is no square shows whether Gemma's embedding scale is rounded as well."""
    folder = make_checkpoint(family, tmp_path, dtype="bfloat16", hidden_size=96)
    prompt = random_prompt(40, seed=3)
    whole = WholeModel(folder).logits(prompt)[-1]
    rounding = np.abs(WholeModel(folder).in_float32().logits(prompt)[-1] - whole).mean()
    at_once = run_prefill(torch_pipeline(folder, (2, 4)), prompt)
    in_chunks = run_prefill(torch_pipeline(folder, (2, 4)), prompt, (13,))
    assert np.abs(at_once - whole).mean() < 0.1 * rounding
    assert np.abs(in_chunks - whole).mean() < 1.5 * rounding


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_stretched_rotations_equal_the_whole_models(rope: dict[str, object], tmp_path: Path) -> None:
    stretch = {"rope_theta": 50_000.0, "original_max_position_embeddings": 64}
    folder = make_checkpoint("llama", tmp_path, rope_parameters=rope | stretch)
    prompt = random_prompt(100, seed=3)
    found = run_prefill(torch_pipeline(folder, (2, 4)), prompt, (13, 70))
    np.testing.assert_allclose(found, WholeModel(folder).logits(prompt)[-1], rtol=0, atol=TOLERANCE)


def _position_off_by_one(monkeypatch: pytest.MonkeyPatch, engines: list[Engine]) -> None:
    arguments = SlicedModel._arguments

    def late(self: SlicedModel, source: torch.Tensor, positions: torch.Tensor, batch: attention.Batch) -> object:
        return arguments(self, source, positions + (positions > 40), batch)

    monkeypatch.setattr(SlicedModel, "_arguments", late)


def _lost_window(monkeypatch: pytest.MonkeyPatch, engines: list[Engine]) -> None:
    attend = attention._attend_sequence
    monkeypatch.setattr(attention, "_attend_sequence", lambda *args: attend(*args[:4], replace(args[4], window=None)))


def _swapped_layers(monkeypatch: pytest.MonkeyPatch, engines: list[Engine]) -> None:
    layers = engines[-1]._stage.sliced.model.model.layers  # type: ignore[attr-defined]
    layers[0], layers[1] = layers[1], layers[0]


def _stale_kv(monkeypatch: pytest.MonkeyPatch, engines: list[Engine]) -> None:
    """One step's keys and values come too late: its position still holds those of the token before."""
    write = SequenceCache.write

    def late(
        self: SequenceCache, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        old_keys, old_values = self._kept[layer]._keys, self._kept[layer]._values
        if start == 41 and old_keys is not None and old_values is not None:
            keys, values = old_keys[:, 40:41], old_values[:, 40:41]
        return write(self, layer, start, keys, values)

    monkeypatch.setattr(SequenceCache, "write", late)


MUTANTS = [
    *product((_position_off_by_one, _swapped_layers, _stale_kv), FAMILIES),
    (_lost_window, "gemma3"),  # the only family with windows
]


@pytest.mark.parametrize(("mutate", "family"), MUTANTS)
def test_mutants_fail_the_check(
    mutate: Callable[[pytest.MonkeyPatch, list[Engine]], None],
    family: str,
    checkpoint: Checkpoints,
    reference: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = reference(family)
    engines = torch_pipeline(checkpoint(family), (3,))
    mutate(monkeypatch, engines)
    with pytest.raises(AssertionError):
        assert_equal(*greedy(engines, expected.prompt, len(expected.ids)), expected)


def test_a_reference_must_be_decisive_and_varied() -> None:
    varied = list(range(32))
    check_reference([0.02] * 32, varied, 1e-3)
    with pytest.raises(ValueError, match="gap"):
        check_reference([0.02] * 31 + [0.019], varied, 1e-3)
    with pytest.raises(ValueError, match="different ids"):
        check_reference([0.02] * 39, list(range(7)) + [1, 2] * 16, 1e-3)
    with pytest.raises(ValueError, match="at least 32"):
        check_reference([0.02] * 31, varied[:31], 1e-3)
