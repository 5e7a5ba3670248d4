"""Decode steps that cannot be recorded, or not with kernels: they are computed another way, the log says why, and
answers stay right. What is recorded is `test_captured.py`'s."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import node.engines.torch
from node.engines.torch import captured
from node.engines.torch.captured import DecodeSteps, means_of
from node.engines.torch.kv import SequenceCache
from tests.oracle.conftest import TOLERANCE
from tests.oracle.frozen import FrozenRecorder, assert_all_equal, assert_equal, attend, pipeline
from tests.oracle.pipelines import greedy, ragged, row, run_prefill, run_step
from tests.oracle.reference import Reference, WholeModel, random_prompt

TOKENS = 14

Checkpoints = Callable[[str], Path]
References = Callable[..., Reference]
WholeModels = Callable[[str], WholeModel]


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load computes with each number of rows that may be recorded; here that takes long."""
    monkeypatch.setattr(captured, "RECORDED_ROWS_MAX", 4)


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4", "gemma4_small", "qwen3_next"])
def test_what_no_kernel_knows_is_computed_row_by_row(
    family: str, checkpoint: Checkpoints, reference: References, caplog: pytest.LogCaptureFixture
) -> None:
    """Latents, chunks, shared keys and states: the log says why, and answers are right."""
    expected, recorder = reference(family), FrozenRecorder()
    with caplog.at_level(logging.WARNING, "node.engines.torch.trial"):
        engines = pipeline(checkpoint(family), (), recorder)
    assert "row by row, which is slower" in caplog.text
    before = recorder.replayed
    assert_equal(*greedy(engines, expected.prompt, TOKENS), expected)
    assert recorder.replayed == before


def test_kernels_are_compiled_for_every_number_of_rows_at_load(checkpoint: Checkpoints) -> None:
    """So that nobody who joins others waits for that; where tensors begin counts as well."""
    met = set()

    def noting(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object) -> torch.Tensor:
        places, positions = args[:2]
        assert isinstance(places, torch.Tensor) and isinstance(positions, torch.Tensor)
        assert (places.data_ptr() % 16, positions.data_ptr() % 16) == (0, 0)
        met.add(query.shape[1])
        return attend(query, key, value, *args)  # type: ignore[arg-type]

    pipeline(checkpoint("llama"), (), attend=noting)
    assert met == {1, 2, 4}


def test_without_triton_rows_are_computed_one_by_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "node.engines.torch.ragged_kernels", raising=False)
    monkeypatch.delattr(node.engines.torch, "ragged_kernels", raising=False)
    with caplog.at_level(logging.WARNING, "node.engines.torch.captured"):
        assert means_of(torch.device("cuda:0")) is None
    assert "not recorded on cuda:0, which makes them slower: import of triton halted" in caplog.text
    assert means_of(torch.device("cpu")) is None
    assert caplog.text.count("not recorded") == 1


def test_what_waits_for_the_device_is_computed_unrecorded(
    checkpoint: Checkpoints, reference: References, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernels for many rows all the same."""
    calls = 0
    compute = DecodeSteps._compute

    def waiting(self: DecodeSteps, count: int) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += 1
        assert int(self._numbers[0]) >= 0
        return compute(self, count)

    monkeypatch.setattr(DecodeSteps, "_compute", waiting)
    expected, recorder = reference("llama"), FrozenRecorder()
    with caplog.at_level(logging.WARNING, "node.engines.torch.captured"):
        engines = pipeline(checkpoint("llama"), (3,), recorder)
    assert "not recorded, which makes them slower: RuntimeError: operation not permitted" in caplog.text
    before = calls
    assert_equal(*greedy(engines, expected.prompt, TOKENS), expected)
    assert recorder.recorded == 0
    assert calls - before == 2 * (TOKENS - 1)


def test_experts_are_right_whether_recorded_or_not(checkpoint: Checkpoints, reference: References) -> None:
    expected = reference("qwen3_moe")
    engines = pipeline(checkpoint("qwen3_moe"), (3,))
    assert_equal(*greedy(engines, expected.prompt, TOKENS), expected)


def test_a_full_memory_for_records_costs_no_answer(
    checkpoint: Checkpoints, reference: References, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [reference("llama", prompt_tokens) for prompt_tokens in (5, 23, 40)]
    recorder = FrozenRecorder(rows_max=2)
    with caplog.at_level(logging.WARNING, "node.engines.torch.captured"):
        found = ragged(pipeline(checkpoint("llama"), (), recorder), [answer.prompt for answer in expected], TOKENS)
    assert_all_equal(found, expected)
    assert recorder.recorded == 2
    assert caplog.text.count("decode steps of 4 rows and more are not recorded") == 1


def test_many_rows_are_computed_at_once_but_not_recorded(checkpoint: Checkpoints, whole_model: WholeModels) -> None:
    recorder = FrozenRecorder()
    (engine,) = pipeline(checkpoint("llama"), (), recorder)
    prompts = [random_prompt(4 + seq, seed=seq) for seq in range(5)]
    for seq, prompt in enumerate(prompts):
        run_prefill([engine], prompt, seq=seq)
    before = recorder.replayed
    found = run_step([engine], [row(seq, len(prompt), [8]) for seq, prompt in enumerate(prompts)])
    assert recorder.replayed == before
    for logits, prompt in zip(found, prompts, strict=True):
        np.testing.assert_allclose(logits, whole_model("llama").logits([*prompt, 8])[-1], rtol=0, atol=TOLERANCE)


def test_only_what_has_moved_is_uploaded(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence of 64 positions has room for 72: it moves at the first and at the ninth step."""
    (engine,) = pipeline(checkpoint("llama"))
    uploads: list[int] = []
    place = DecodeSteps._place

    def counting(self: DecodeSteps, wanted: Sequence[object]) -> None:
        uploads.append(sum(old is not new for old, new in zip(self._uploaded, wanted, strict=False)))
        place(self, wanted)  # type: ignore[arg-type]

    run_prefill([engine], random_prompt(64, seed=1))
    monkeypatch.setattr(DecodeSteps, "_place", counting)
    for step in range(12):
        run_step([engine], [row(1, 64 + step, [7])])
    assert uploads == [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]


def test_what_a_failed_step_left_is_given_back_by_the_next() -> None:
    """A long chunk of a layer with a window needs room that decode steps do not."""
    sequence = SequenceCache([16, None], context_tokens=400)
    token, chunk = torch.zeros(2, 1, 16), torch.zeros(2, 300, 16)
    for layer in (0, 1):
        sequence.write(layer, 0, token, token)
    sequence.commit(1, {})
    sequence.write(0, 1, chunk, chunk)  # and then layer 1 fails
    assert sequence.allocated_bytes > 2 * chunk.nbytes
    assert sequence.places(2) is sequence.places(2)
    assert sequence.allocated_bytes <= 8 * token.nbytes
    assert [int(room) for room in sequence.places(2)[:, 2]] == [2, 2]
