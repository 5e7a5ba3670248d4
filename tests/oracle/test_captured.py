"""Decode steps that are recorded once and computed again equal the whole model, whatever happens to their sequences.

On a processor: the kernels' own source runs as a stand-in for Triton, and a recorder as one for CUDA graphs, which
freezes whatever was not read from a tensor. `test_cuda_engine.py` is the same on a card.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from cluster.types import SequenceId
from node.engines.torch import captured, layer_kv
from node.engines.torch.captured import DecodeSteps
from node.engines.torch.engine import TorchEngine
from node.engines.torch.kv import SequenceCache
from tests.oracle.conftest import TOLERANCE
from tests.oracle.frozen import FrozenRecorder, assert_all_equal, assert_equal, attend, pipeline
from tests.oracle.pipelines import greedy, load_pipeline, ragged, row, run_prefill, run_step, stage_specs
from tests.oracle.reference import Reference, WholeModel, random_prompt

RECORDED = ("llama", "qwen3", "gemma2", "gemma3", "gpt_oss")
"""Plain ones, windows, soft-caps and sinks. Experts are those of gpt-oss."""

TOKENS = 14
"""Of each answer: caches of 40 positions grow twice in that, and windows move on."""

Checkpoints = Callable[[str], Path]
References = Callable[..., Reference]
WholeModels = Callable[[str], WholeModel]


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load computes with each number of rows that may be recorded; here that takes long."""
    monkeypatch.setattr(captured, "RECORDED_ROWS_MAX", 4)


@pytest.mark.parametrize(("family", "cuts"), [*((family, ()) for family in RECORDED), ("gemma3", (2, 4))])
def test_replayed_steps_equal_the_whole_model(
    family: str, cuts: tuple[int, ...], checkpoint: Checkpoints, reference: References
) -> None:
    expected, recorder = reference(family), FrozenRecorder()
    engines = pipeline(checkpoint(family), cuts, recorder)
    before = recorder.replayed
    assert_equal(*greedy(engines, expected.prompt, TOKENS), expected)
    assert recorder.recorded == len(engines)
    assert recorder.replayed - before == len(engines) * (TOKENS - 1)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_sequences_join_and_leave_recorded_steps(family: str, checkpoint: Checkpoints, reference: References) -> None:
    """Prompts of some travel with decode rows of others; then they decode together, one, two and three at a time."""
    expected = [reference(family, prompt_tokens) for prompt_tokens in (5, 23, 40)]
    recorder = FrozenRecorder()
    engines = pipeline(checkpoint(family), (3,), recorder)
    found = ragged(engines, [answer.prompt for answer in expected], TOKENS)
    assert_all_equal(found, expected)
    assert recorder.recorded == 3 * len(engines)  # of one, two and four rows


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_beside_a_prompt_attend_at_once(family: str, checkpoint: Checkpoints, whole_model: WholeModels) -> None:
    """Three of them, and behind them two chunks of prompts, row by row."""
    met: list[int] = []

    def noting(query: torch.Tensor, *args: object) -> torch.Tensor:
        met.append(query.shape[1])
        return attend(query, *args)  # type: ignore[arg-type]

    engines = pipeline(checkpoint(family), (3,), attend=noting)
    prompts = [random_prompt(length, seed=length) for length in (20, 31, 7, 9, 30)]
    for seq in (0, 1, 2):
        run_prefill(engines, prompts[seq], seq=seq)
    met.clear()
    rows = [row(seq, len(prompts[seq]), [8]) for seq in (0, 1, 2)]
    found = run_step(engines, [*rows, row(3, 0, prompts[3]), row(4, 0, prompts[4][:25], draw=False)])
    assert met == [3] * 6
    (last,) = run_step(engines, [row(0, 21, [9], draw=False), row(4, 25, prompts[4][25:])])
    whole = whole_model(family)
    for logits, tokens in zip(found, [*([*prompts[seq], 8] for seq in (0, 1, 2)), prompts[3]], strict=True):
        np.testing.assert_allclose(logits, whole.logits(tokens)[-1], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(last, whole.logits(prompts[4])[-1], rtol=0, atol=TOLERANCE)
    (after,) = run_step(engines, [row(0, 22, [7])])
    np.testing.assert_allclose(after, whole.logits([*prompts[0], 8, 9, 7])[-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_forks_and_trims_between_replays(family: str, checkpoint: Checkpoints, whole_model: WholeModels) -> None:
    a, b = SequenceId(1), SequenceId(2)
    prompt, tail, other = random_prompt(30, seed=5), random_prompt(6, seed=6), random_prompt(20, seed=7)
    (engine,) = pipeline(checkpoint(family))
    run_prefill([engine], prompt)
    for step, token in enumerate(tail):
        run_step([engine], [row(a, 30 + step, [token])])
    assert engine.fork(a, b, 33) == 33
    assert engine.trim(a, 28) == 28
    for step, token in enumerate(other):
        first, second = run_step([engine], [row(b, 33 + step, [token]), row(a, 28 + step, [token])])
    whole = whole_model(family)
    np.testing.assert_allclose(first, whole.logits(prompt + tail[:3] + other)[-1], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(second, whole.logits(prompt[:28] + other)[-1], rtol=0, atol=TOLERANCE)
    engine.drop(b)
    (alone,) = run_step([engine], [row(a, 48, [7])])
    np.testing.assert_allclose(alone, whole.logits([*prompt[:28], *other, 7])[-1], rtol=0, atol=TOLERANCE)


def test_rows_that_do_not_draw_have_no_logits(checkpoint: Checkpoints, whole_model: WholeModels) -> None:
    prompts = [random_prompt(length, seed=length) for length in (9, 14, 11)]
    (engine,) = pipeline(checkpoint("llama"))
    for seq, prompt in enumerate(prompts):
        run_prefill([engine], prompt, seq=seq)
    (found,) = run_step([engine], [row(seq, len(prompts[seq]), [8], draw=seq == 1) for seq in range(3)])
    np.testing.assert_allclose(found, whole_model("llama").logits([*prompts[1], 8])[-1], rtol=0, atol=TOLERANCE)
    assert run_step([engine], [row(0, 10, [8], draw=False)]).shape == (0, len(found))
    assert [engine.length(SequenceId(seq)) for seq in range(3)] == [11, 15, 12]


def test_packed_weights_are_recorded_too(checkpoint: Checkpoints) -> None:
    recorder, prompt = FrozenRecorder(), random_prompt(20, seed=1)
    folder = checkpoint("llama")
    plain = load_pipeline([TorchEngine], stage_specs(folder, (), bits=8))
    ids, logits = greedy(plain, prompt, 12)
    found, other = greedy(pipeline(folder, (), recorder, bits=8), prompt, 12)
    assert found == ids
    np.testing.assert_allclose(other, logits, rtol=0, atol=TOLERANCE)
    assert recorder.recorded == 1


# -- What must be noticed ------------------------------------------------------------------------------------


@pytest.fixture
def _lasting_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong on purpose reads and writes where nothing of it is any more: there has to be something."""
    moved, kept = layer_kv._moved, []

    def padded(tensor: torch.Tensor, old: slice, capacity: int) -> torch.Tensor:
        new = moved(tensor, old, capacity)
        room = torch.zeros(new.numel() + (1 << 16))
        kept.append(room)
        return room[: new.numel()].view_as(new).copy_(new)

    monkeypatch.setattr(layer_kv, "_moved", padded)


def _never_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses stay as they were first told."""
    places, told = SequenceCache.places, {}

    def stale(self: SequenceCache, end: int) -> np.ndarray:
        found = places(self, end)
        return told.setdefault(id(self), (self, found))[1]  # whose number must not become another's

    monkeypatch.setattr(SequenceCache, "places", stale)


def _positions_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = DecodeSteps._compute

    def frozen(self: DecodeSteps, count: int) -> tuple[torch.Tensor, ...]:
        with _disable_current_modes():  # so that no copy is recorded
            numbers, self._numbers = self._numbers, self._numbers.clone()
        try:
            return compute(self, count)
        finally:
            self._numbers = numbers

    monkeypatch.setattr(DecodeSteps, "_compute", frozen)


def _rows_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes another's row attends to the other's past."""
    place = DecodeSteps._place

    def first_ones(self: DecodeSteps, wanted: Sequence[np.ndarray]) -> None:
        kept = [new if old is self._nobody else old for old, new in zip(self._uploaded, wanted, strict=False)]
        place(self, kept)

    monkeypatch.setattr(DecodeSteps, "_place", first_ones)


@pytest.mark.usefixtures("_lasting_memory")
@pytest.mark.parametrize("mutate", [_never_moved, _positions_frozen, _rows_left_in_place])
def test_mutants_fail_the_check(
    mutate: Callable[[pytest.MonkeyPatch], None],
    checkpoint: Checkpoints,
    reference: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = [reference("llama", prompt_tokens) for prompt_tokens in (23, 40)]
    engines = pipeline(checkpoint("llama"))
    mutate(monkeypatch)
    found = ragged(engines, [answer.prompt for answer in expected], TOKENS)
    with pytest.raises(AssertionError):
        assert_all_equal(found, expected)


def test_a_recorder_that_freezes_too_much_is_noticed_at_load(
    checkpoint: Checkpoints, reference: References, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose steps raise nothing and are simply wrong."""
    _positions_frozen(monkeypatch)
    expected, recorder = reference("llama"), FrozenRecorder()
    with caplog.at_level(logging.WARNING, "node.engines.torch.trial"):
        engines = pipeline(checkpoint("llama"), (), recorder)
    assert "from rows computed one by one" in caplog.text
    assert_equal(*greedy(engines, expected.prompt, TOKENS), expected)
