"""The MLX engine's KV memory: cut back, shared, refused and rearranged without changing an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from cluster.errors import AtCapacity, RequestError
from cluster.types import SequenceId
from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.mlx.positions import LayerCache
from tests.checkpoints import FAMILIES
from tests.oracle.mlx_reference import MLX_TOLERANCE, mlx_reference, whole_mlx_model
from tests.oracle.pipelines import greedy, load_pipeline, row, run_prefill, run_step, stage_specs
from tests.oracle.reference import random_prompt
from tests.oracle.test_mlx_engine import assert_equal, assert_ragged_batch_equal, mlx_pipeline

Checkpoints = Callable[[str], Path]
ONE, TWO, THREE = SequenceId(1), SequenceId(2), SequenceId(3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fork_continues_like_its_source_and_apart_from_it(family: str, checkpoint: Checkpoints) -> None:
    expected = mlx_reference(checkpoint(family))
    engines = mlx_pipeline(checkpoint(family), (3,))
    run_prefill(engines, [*expected.prompt, *random_prompt(9, seed=1)], seq=ONE)
    for engine in engines:
        assert engine.fork(ONE, TWO, 30) == 30
    run_prefill(engines, random_prompt(20, seed=2), seq=ONE, start=49)  # the source goes elsewhere
    logits = run_prefill(engines, expected.prompt[30:], seq=TWO, start=30)
    assert_equal([int(logits.argmax())], logits[None], expected)


@pytest.mark.parametrize("length", [39, 20, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trimmed_sequence_continues_as_if_it_had_never_gone_on(
    family: str, length: int, checkpoint: Checkpoints
) -> None:
    """Gemma's window of 16 lies wholly behind the shorter cuts, but what it needs is still there."""
    expected = mlx_reference(checkpoint(family))
    engines = mlx_pipeline(checkpoint(family), (3,))
    run_prefill(engines, [*expected.prompt[:length], *random_prompt(50, seed=1)], seq=ONE)
    for engine in engines:
        assert engine.rewind.every is None
        assert engine.trim(ONE, length) == length == engine.length(ONE)
    logits = run_prefill(engines, expected.prompt[length:], seq=ONE, start=length)
    assert_equal([int(logits.argmax())], logits[None], expected)


def test_verbs_honour_no_more_than_there_is(checkpoint: Checkpoints) -> None:
    (engine,) = engines = mlx_pipeline(checkpoint("llama"), kv_tokens=32)
    run_prefill(engines, random_prompt(20, seed=0), seq=ONE)
    assert engine.fork(THREE, TWO, 5) == 0 == engine.length(TWO)
    assert engine.fork(ONE, TWO, 99) == 12 == engine.length(TWO)  # what fits
    assert engine.trim(TWO, 99) == 12
    assert engine.trim(TWO, 0) == 0 == engine.length(TWO)
    assert engine.trim(THREE, 4) == 0
    assert engine.fork(ONE, TWO, -1) == 0
    engine.drop(THREE)
    with pytest.raises(ValueError, match="onto itself"):
        engine.fork(ONE, ONE, 3)
    assert engine.length(ONE) == 20


def test_capacity_counts_positions_and_allocated_bytes(checkpoint: Checkpoints) -> None:
    (engine,) = engines = mlx_pipeline(checkpoint("llama"))
    empty = engine.capacity()
    assert (empty.kv_tokens_used, empty.sequences, empty.kv_bytes) == (0, 0, 0)
    run_prefill(engines, random_prompt(20, seed=0), seq=ONE)
    full = engine.capacity()
    token_bytes = 6 * 2 * 2 * 16 * 4  # layers, keys and values, heads, size, float32
    assert (full.kv_tokens_used, full.sequences) == (20, 1)
    assert 20 * token_bytes <= full.kv_bytes <= 112 * token_bytes
    engine.drop(ONE)
    assert engine.capacity() == empty


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([row(1, 19, [7])], ValueError),
        ([row(1, 21, [7])], ValueError),
        ([row(2, 1, [7])], ValueError),
        ([row(1, 20, [7]), row(1, 21, [7])], ValueError),
        ([row(1, 20, [])], ValueError),
        ([row(1, 20, [384])], ValueError),
        ([row(1, 20, [-1])], ValueError),
        ([row(1, 20, [7]), row(2, 0, [7] * 24)], AtCapacity),
        ([row(1, 20, [7] * 13)], RequestError),
    ],
)
def test_a_refused_step_changes_nothing(rows: list[object], error: type[Exception], checkpoint: Checkpoints) -> None:
    (engine,) = engines = mlx_pipeline(checkpoint("llama"), kv_tokens=44, context_tokens=32)
    prompt = random_prompt(21, seed=0)
    run_prefill(engines, prompt[:20], seq=ONE)
    before = engine.capacity()
    with pytest.raises(error):
        engine.step(rows, None)  # type: ignore[arg-type]
    assert engine.capacity() == before
    expected = whole_mlx_model(checkpoint("llama")).logits(prompt)[-1]
    after = run_prefill(engines, prompt[20:], seq=ONE, start=20)
    np.testing.assert_allclose(after, expected, rtol=0, atol=MLX_TOLERANCE)


def test_a_boundary_of_the_wrong_shape_or_type_is_refused(checkpoint: Checkpoints) -> None:
    first, last = mlx_pipeline(checkpoint("llama"), (3,))
    rows = [row(1, 0, [7, 8, 9])]
    boundary = first.step(rows, None)
    assert isinstance(boundary, tuple)
    with pytest.raises(ValueError, match="boundary"):
        first.step([row(2, 0, [7, 8, 9])], boundary)
    with pytest.raises(ValueError, match="boundary"):
        last.step(rows, None)
    with pytest.raises(ValueError, match="boundary"):
        last.step([row(1, 0, [7, 8])], boundary)
    assert last.capacity().sequences == 0


def test_a_step_without_rows_answers_nothing(checkpoint: Checkpoints) -> None:
    assert run_step(mlx_pipeline(checkpoint("llama"), (2, 4)), []).shape == (0, 384)


def test_when_the_device_fails_half_way_no_sequence_passes_for_whole(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine,) = engines = mlx_pipeline(checkpoint("llama"))
    run_prefill(engines, random_prompt(20, seed=0), seq=ONE)
    run_prefill(engines, random_prompt(20, seed=1), seq=TWO)
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", _raise_out_of_memory)
        with pytest.raises(RuntimeError):
            run_step(engines, [row(1, 20, [7])])
    assert (engine.length(ONE), engine.length(TWO)) == (0, 20)
    expected = mlx_reference(checkpoint("llama"))
    assert_equal(*greedy(engines, expected.prompt, 4, seq=ONE), expected)


def test_a_step_that_fails_before_the_device_is_asked_changes_nothing(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails on another thread, in the last layer: work that it had begun could not be finished here."""
    expected = mlx_reference(checkpoint("llama"))
    (engine,) = engines = mlx_pipeline(checkpoint("llama"))
    run_prefill(engines, expected.prompt[:20], seq=ONE)
    before = engine.capacity()
    update = LayerCache.update_and_fetch
    fetched: list[LayerCache] = []

    def failing(self: LayerCache, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        fetched.append(self)
        if len(fetched) == 6:
            raise RuntimeError("no memory for the graph")
        return update(self, keys, values)

    def step() -> None:
        with pytest.raises(RuntimeError, match="graph"):
            run_step(engines, [row(1, 20, expected.prompt[20:]), row(2, 0, [7])])

    with monkeypatch.context() as patch:
        patch.setattr(LayerCache, "update_and_fetch", failing)
        _on_a_thread(step)
    assert len(fetched) == 6
    assert engine.capacity() == before
    logits = run_prefill(engines, expected.prompt[20:], seq=ONE, start=20)
    assert_equal([int(logits.argmax())], logits[None], expected)


def test_when_memory_ends_while_sequences_move_none_of_them_passes_for_whole(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine,) = engines = mlx_pipeline(checkpoint("llama"))
    for seq in (ONE, TWO, THREE):
        run_prefill(engines, random_prompt(20, seed=seq), seq=seq)
    evaluate, calls = mx.eval, 0

    def failing(*arrays: mx.array) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # of six layers
            raise RuntimeError("out of memory")
        evaluate(*arrays)

    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_step(engines, [row(1, 20, [7]), row(2, 20, [7])])
    assert [engine.length(seq) for seq in (ONE, TWO, THREE)] == [0, 0, 20]
    expected = mlx_reference(checkpoint("llama"))
    assert_equal(*greedy(engines, expected.prompt, 4, seq=ONE), expected)


def _raise_out_of_memory(*_: object) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_answers_do_not_depend_on_how_tight_the_memory_is(family: str, checkpoint: Checkpoints) -> None:
    """With exactly the room that they need, sequences of 5 to 40 tokens cannot share a padded lane."""
    expected = [mlx_reference(checkpoint(family), prompt_tokens) for prompt_tokens in (5, 23, 24, 40)]
    kv_tokens = sum(len(answer.prompt) + len(answer.ids) for answer in expected)
    engines = mlx_pipeline(checkpoint(family), (3,), kv_tokens=kv_tokens)
    assert_ragged_batch_equal(engines, expected, chunk=9)
    for engine in engines:
        used = engine.capacity().kv_tokens_used
        assert engine.capacity().kv_bytes <= (used + 4 * 16) * 3 * 2 * 2 * 16 * 4


def test_a_stage_loaded_on_one_thread_runs_on_another(checkpoint: Checkpoints) -> None:
    """MLX ties unfinished work to the thread that began it; nothing unfinished may outlive a call."""
    expected = mlx_reference(checkpoint("gemma3"))
    engines: list[Engine] = []
    specs = stage_specs(checkpoint("gemma3"), (3,))
    _on_a_thread(lambda: engines.extend(load_pipeline([MlxEngine] * 2, specs)))
    _on_a_thread(lambda: run_prefill(engines, expected.prompt[:20]))
    _on_a_thread(lambda: [engine.fork(ONE, TWO, 20) for engine in engines])
    logits = run_prefill(engines, expected.prompt[20:], seq=TWO, start=20)
    assert_equal([int(logits.argmax())], logits[None], expected)


def _on_a_thread(work: Callable[[], object]) -> None:
    thread = Thread(target=work)
    thread.start()
    thread.join()
