"""What is kept of an ended sequence serves the next one that begins alike: a fork of it, or the sequence moved into the
next one's place, goes on as a fresh computation would, on every kind of cache and engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.rewinding import WaysBack
from cluster.types import SequenceId
from node.engine import Engine
from node.engines.mlx.cache import KvCache as MlxCache
from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from node.engines.torch.kv import SequenceCache
from tests.checkpoints import FAMILIES, MORE_FAMILIES, STATE_FAMILIES
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import load_pipeline, row, run_prefill, run_step, stage_specs
from tests.oracle.reference import WholeModel, random_prompt
from tests.oracle.test_mixed import Makers

Checkpoints = Callable[[str], Path]
WholeModels = Callable[[str], WholeModel]

MAKERS = [
    pytest.param((TorchEngine,), id="torch"),
    pytest.param((MlxEngine,), id="mlx"),
    pytest.param((TorchEngine, MlxEngine), id="torch-mlx"),
    pytest.param((MlxEngine, TorchEngine), id="mlx-torch"),
]
KEPT, NEXT, OTHER = SequenceId(1), SequenceId(2), SequenceId(3)
CHUNKS = (100, 200, 280)  # the third passes 256, where states leave a snapshot
PROMPT, ANSWER, MORE = random_prompt(300, seed=5), random_prompt(6, seed=6), random_prompt(20, seed=7)
HISTORY = [*PROMPT, *ANSWER]
PARTED = 250
"""Where another prompt parts from the first: too far back for snapshots, near enough for windows."""


def after_a_turn(makers: Makers, folder: Path) -> list[Engine]:
    """A pipeline that holds a sequence's prompt and its answer."""
    cut = max(cut for cut in read_facts(open_checkpoint(folder)).legal_cuts if cut <= 3)
    engines = load_pipeline(makers, stage_specs(folder, (cut,) if len(makers) == 2 else ()))
    run_prefill(engines, PROMPT, CHUNKS, seq=KEPT)
    for ahead, token in enumerate(ANSWER):
        run_step(engines, [row(KEPT, len(PROMPT) + ahead, [token])])
    return engines


def expected_length(folder: Path, asked: int) -> int:
    """What the coordinator foresees, from the model's files and the steps alone."""
    ways: WaysBack[str] = WaysBack(read_facts(open_checkpoint(folder)).rewind)
    start = 0
    for end in (*CHUNKS, *range(len(PROMPT), len(HISTORY) + 1)):
        ways.grew(end, "held" if ways.wants_snapshot(start, end) else None)
        start = end
    return ways.honoured(len(HISTORY), asked)


def assert_goes_on(
    engines: Sequence[Engine], seq: SequenceId, length: int, tokens: list[int], whole: WholeModel
) -> None:
    """The sequence has so many of these tokens; the rest in two chunks, then the next token's."""
    expected = whole.logits(tokens)
    middle = (length + len(tokens)) // 2
    for begin, end in ((length, middle), (middle, len(tokens) - 1), (len(tokens) - 1, len(tokens))):
        found = run_step(engines, [row(seq, begin, tokens[begin:end])])[0]
        np.testing.assert_allclose(found, expected[end - 1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("makers", MAKERS)
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *STATE_FAMILIES])
def test_the_next_turn_goes_on_from_what_was_kept(
    family: str, makers: Makers, checkpoint: Checkpoints, whole_model: WholeModels
) -> None:
    """A prompt that parts from the history early, one that is the history and more, forked; then the same, moved."""
    folder = checkpoint(family)
    engines = after_a_turn(makers, folder)
    for asked, seq in ((PARTED, OTHER), (len(HISTORY), NEXT)):
        length = expected_length(folder, asked)
        assert [engine.fork(KEPT, seq, asked) for engine in engines] == [length] * len(engines)
        assert_goes_on(engines, seq, length, [*HISTORY[:asked], *MORE], whole_model(family))
        for engine in engines:
            engine.drop(seq)
    assert [engine.move(KEPT, NEXT, len(HISTORY)) for engine in engines] == [len(HISTORY)] * len(engines)
    assert [(engine.length(KEPT), engine.capacity().sequences) for engine in engines] == [(0, 1)] * len(engines)
    assert_goes_on(engines, NEXT, len(HISTORY), [*HISTORY, *MORE], whole_model(family))


@pytest.mark.parametrize("makers", MAKERS[:2])
@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_a_moved_sequence_is_cut_back_as_a_forked_one_is(
    family: str, makers: Makers, checkpoint: Checkpoints, whole_model: WholeModels
) -> None:
    (engine,) = engines = after_a_turn(makers, checkpoint(family))
    asked = 290
    length = expected_length(checkpoint(family), asked)
    assert 0 < length <= asked
    assert engine.move(KEPT, NEXT, asked) == length
    assert_goes_on(engines, NEXT, length, [*HISTORY[:asked], *MORE], whole_model(family))


@pytest.mark.parametrize("makers", MAKERS[:2])
def test_a_move_replaces_what_was_there_and_takes_no_memory(makers: Makers, checkpoint: Checkpoints) -> None:
    (engine,) = engines = after_a_turn(makers, checkpoint("llama"))
    held_bytes = engine.capacity().kv_bytes
    run_prefill(engines, MORE, seq=NEXT)
    assert engine.move(KEPT, NEXT, 10_000) == len(HISTORY)
    assert (engine.capacity().sequences, engine.capacity().kv_bytes) == (1, held_bytes)
    assert engine.move(KEPT, NEXT, 5) == 0  # there is no such sequence any more, so nothing is in its place
    assert engine.capacity().sequences == 0
    with pytest.raises(ValueError, match="onto itself"):
        engine.move(NEXT, NEXT, 1)


@pytest.mark.parametrize("makers", MAKERS[:2])
def test_sequences_that_compute_together_are_moved_apart(
    makers: Makers, checkpoint: Checkpoints, whole_model: WholeModels
) -> None:
    """They share memory on MLX; what one of them is called from now on is no matter to the other."""
    engines = after_a_turn(makers, checkpoint("llama"))
    run_prefill(engines, PROMPT, CHUNKS, seq=OTHER)
    run_step(engines, [row(OTHER, len(PROMPT), [9]), row(KEPT, len(HISTORY), [8])])
    assert engines[0].move(KEPT, NEXT, len(HISTORY)) == len(HISTORY)
    rows = [row(NEXT, len(HISTORY), MORE[:1]), row(OTHER, len(PROMPT) + 1, MORE[:1])]
    for found, past in zip(run_step(engines, rows), (HISTORY, [*PROMPT, 9]), strict=True):
        expected = whole_model("llama").logits([*past, MORE[0]])[-1]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def _one_too_many(patch: pytest.MonkeyPatch) -> None:
    """The cut leaves a position more than it says."""
    cut = SequenceCache.cut
    patch.setattr(SequenceCache, "cut", lambda self, length: cut(self, length + 1))
    trim = MlxCache.trim
    patch.setattr(MlxCache, "trim", lambda self, seq, length: trim(self, seq, length + 1) - 1)


@pytest.mark.parametrize("makers", MAKERS[:2])
def test_a_cut_off_by_one_fails_the_check(
    makers: Makers, checkpoint: Checkpoints, whole_model: WholeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    _one_too_many(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        test_a_moved_sequence_is_cut_back_as_a_forked_one_is("llama", makers, checkpoint, whole_model)
