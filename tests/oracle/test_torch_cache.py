"""The torch engine's cache verbs, its limits, and that a failed step changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import AtCapacity, RequestError
from cluster.steps import Row
from cluster.types import DType, HostTensor, SequenceId
from node.engine import Engine
from node.engines.torch.engine import TorchEngine
from node.engines.torch.kv import SequenceCache
from tests.checkpoints import FAMILIES, VOCABULARY
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import load_pipeline, row, run_prefill, run_step, stage_specs
from tests.oracle.reference import WholeModel, random_prompt

A, B = SequenceId(1), SequenceId(2)

Checkpoints = Callable[[str], Path]
WholeModels = Callable[[str], WholeModel]


def one_stage(folder: Path, **limits: int) -> Engine:
    return load_pipeline([TorchEngine], stage_specs(folder, (), **limits))[0]


def assert_close(found: np.ndarray, model: WholeModel, tokens: list[int]) -> None:
    np.testing.assert_allclose(found, model.logits(tokens)[-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 7, 15, 16, 17, 29, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fork_continues_like_a_fresh_sequence(
    family: str, length: int, checkpoint: Checkpoints, whole_model: WholeModels
) -> None:
    """Also its source: neither notices what the other appends."""
    prompt, other = random_prompt(30, seed=5), random_prompt(8, seed=6)
    engine = one_stage(checkpoint(family))
    run_prefill([engine], prompt)
    assert engine.fork(A, B, length) == length
    forked, source = run_step([engine], [row(B, length, other), row(A, 30, other)])
    assert_close(forked, whole_model(family), prompt[:length] + other)
    assert_close(source, whole_model(family), prompt + other)
    assert (engine.length(A), engine.length(B)) == (38, length + 8)


@pytest.mark.parametrize("length", [1, 7, 15, 16, 17, 29, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trimmed_sequence_continues_like_a_fresh_one(
    family: str, length: int, checkpoint: Checkpoints, whole_model: WholeModels
) -> None:
    prompt, other = random_prompt(30, seed=5), random_prompt(40, seed=6)
    engine = one_stage(checkpoint(family))
    assert engine.rewind.every is None
    run_prefill([engine], prompt)
    assert engine.trim(A, length) == length
    assert engine.length(A) == length
    assert_close(run_prefill([engine], other, (3, 20), start=length), whole_model(family), prompt[:length] + other)


def test_verbs_honour_at_most_what_exists(checkpoint: Checkpoints) -> None:
    engine = one_stage(checkpoint("llama"))
    run_prefill([engine], random_prompt(10, seed=0))
    assert engine.fork(A, B, 99) == 10
    assert engine.trim(B, 99) == 10
    assert engine.fork(SequenceId(7), B, 5) == 0
    assert engine.length(B) == 0
    assert engine.trim(SequenceId(7), 5) == 0
    engine.drop(SequenceId(7))
    assert engine.trim(A, 0) == 0
    assert engine.capacity().sequences == 0


def test_what_is_dropped_is_free_again(checkpoint: Checkpoints) -> None:
    engine = one_stage(checkpoint("llama"), kv_tokens=64, context_tokens=64)
    empty = engine.capacity()
    for seq in range(20):
        run_prefill([engine], random_prompt(60, seed=seq), seq=seq)
        assert engine.capacity().kv_tokens_used == 60
        assert engine.capacity().kv_bytes > 0
        engine.drop(SequenceId(seq))
    assert engine.capacity() == empty


def test_a_full_cache_refuses_the_step_and_stays_as_it_is(checkpoint: Checkpoints, whole_model: WholeModels) -> None:
    prompt = random_prompt(50, seed=2)
    engine = one_stage(checkpoint("llama"), kv_tokens=52, context_tokens=60)
    run_prefill([engine], prompt[:49])
    before = engine.capacity()
    with pytest.raises(AtCapacity, match="53 cached positions; there are 52"):
        engine.step([row(A, 49, prompt[49:]), row(B, 0, prompt[:3])], None)
    assert engine.capacity() == before
    assert engine.fork(A, B, 49) == 3
    engine.drop(B)
    assert_close(run_prefill([engine], prompt[49:], start=49), whole_model("llama"), prompt)


def test_a_sequence_longer_than_the_context_is_refused(checkpoint: Checkpoints) -> None:
    engine = one_stage(checkpoint("llama"), kv_tokens=100, context_tokens=20)
    with pytest.raises(RequestError, match="reaches 21 tokens; the plan allows 20"):
        run_prefill([engine], random_prompt(21, seed=0))
    run_prefill([engine], random_prompt(20, seed=0))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, 3, (7,))], "has 4 cached positions; its row starts at 3"),
        ([row(1, 5, (7,))], "has 4 cached positions; its row starts at 5"),
        ([row(2, 1, (7,))], "has 0 cached positions; its row starts at 1"),
        ([row(1, 4, (7,)), row(1, 5, (7,))], "one row in a step"),
        ([row(1, 4, ())], "one or more token ids"),
        ([row(1, 4, (VOCABULARY,))], "token ids below"),
        ([row(1, 4, (-1,))], "token ids below"),
    ],
)
def test_impossible_rows_are_refused_before_anything_changes(
    rows: list[Row], message: str, checkpoint: Checkpoints
) -> None:
    engine = one_stage(checkpoint("llama"))
    run_prefill([engine], random_prompt(4, seed=0))
    before = engine.capacity()
    with pytest.raises(ValueError, match=message):
        engine.step(rows, None)
    assert engine.capacity() == before


@pytest.mark.parametrize(
    "inputs",
    [
        None,
        (),
        (HostTensor(DType.F32, (1, 64), bytes(256)),),
        (HostTensor(DType.F32, (2, 32), bytes(256)),),
        (HostTensor(DType.BF16, (2, 64), bytes(256)),),
        (HostTensor(DType.F32, (2, 64), bytes(512)),) * 2,
    ],
)
def test_a_boundary_that_is_not_the_plans_is_refused(
    inputs: tuple[HostTensor, ...] | None, checkpoint: Checkpoints
) -> None:
    engine = TorchEngine()
    engine.load(stage_specs(checkpoint("llama"), (3,))[1], lambda progress: None)
    with pytest.raises(ValueError, match="expected boundary tensors"):
        engine.step([row(1, 0, (7, 8))], inputs)
    assert engine.length(A) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_that_fails_midway_leaves_every_row_as_it_was(
    family: str, checkpoint: Checkpoints, whole_model: WholeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, other = random_prompt(30, seed=5), random_prompt(40, seed=6)
    engine = one_stage(checkpoint(family))
    run_prefill([engine], prompt)
    write = SequenceCache.write

    def failing(self: SequenceCache, layer: int, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == 4:
            raise MemoryError
        return write(self, layer, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(SequenceCache, "write", failing)
        with pytest.raises(MemoryError):
            run_step([engine], [row(A, 30, random_prompt(90, seed=7)), row(B, 0, other)])
    assert (engine.length(A), engine.length(B)) == (30, 0)
    first, second = run_step([engine], [row(A, 30, other), row(B, 0, other)])
    assert_close(first, whole_model(family), prompt + other)
    assert_close(second, whole_model(family), other)


def test_a_step_may_have_no_rows_and_no_draws(checkpoint: Checkpoints) -> None:
    engines = load_pipeline([TorchEngine] * 2, stage_specs(checkpoint("qwen3"), (3,)))
    assert run_step(engines, []).shape == (0, VOCABULARY)
    assert run_step(engines, [row(A, 0, (7, 8), draw=False)]).shape == (0, VOCABULARY)
    assert [engine.length(A) for engine in engines] == [2, 2]


def test_decoding_seldom_moves_the_cache_and_never_holds_much_more_than_it_needs() -> None:
    """400 decode steps of one layer: an eighth more than used, and few reallocations."""
    sequence = SequenceCache([None], context_tokens=400)
    token = torch.zeros(2, 1, 16)
    places = set()
    for position in range(400):
        keys, _, _ = sequence.write(0, position, token, token)
        places.add(keys.data_ptr())
        assert sequence.allocated_bytes <= 2 * token.nbytes * (position + 1) * 9 / 8
    assert len(places) <= 45
    assert sequence.allocated_bytes == 2 * token.nbytes * 400
