"""States go back to snapshots, the same on every stage and engine, and go on from there as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.rewinding import SNAPSHOTS_MAX, WaysBack
from cluster.types import SequenceId
from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.mlx.lane import Lane
from node.engines.mlx.positions import StateCache
from node.engines.torch import recurrent
from node.engines.torch.engine import TorchEngine
from tests.checkpoints import STATE_FAMILIES
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import load_pipeline, row, run_prefill, run_step, stage_specs
from tests.oracle.reference import WholeModel, random_prompt
from tests.oracle.test_mixed import Makers

Checkpoints = Callable[[str], Path]
WholeModels = Callable[[str], WholeModel]

MAKERS = [
    pytest.param((TorchEngine,), id="torch"),
    pytest.param((MlxEngine,), id="mlx"),
    pytest.param((TorchEngine, MlxEngine, TorchEngine), id="torch-mlx-torch"),
    pytest.param((MlxEngine, TorchEngine, MlxEngine), id="mlx-torch-mlx"),
]
CUTS = {1: (), 3: (2, 3)}  # the middle one of three has only a layer that attends
ONE, TWO, THREE = SequenceId(1), SequenceId(2), SequenceId(3)
PROMPT, OTHER = random_prompt(600, seed=5), random_prompt(6, seed=6)
CHUNKS = (200, 270, 300, 520)  # a chunk that passes 256, and one that passes 512


def pipeline(makers: Makers, folder: Path) -> list[Engine]:
    return load_pipeline(makers, stage_specs(folder, CUTS[len(makers)], kv_tokens=4096, context_tokens=1024))


def assert_goes_on(engines: list[Engine], seq: SequenceId, length: int, model: WholeModel) -> None:
    """The sequence holds so many tokens of the prompt, and nothing of what followed."""
    expected = model.logits([*PROMPT[:length], *OTHER])
    for begin, end in ((0, 1), (1, len(OTHER))):
        found = run_step(engines, [row(seq, length + begin, OTHER[begin:end])])[0]
        np.testing.assert_allclose(found, expected[length + end - 1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("makers", MAKERS)
@pytest.mark.parametrize("family", STATE_FAMILIES)
def test_every_stage_goes_back_to_the_same_snapshot(
    family: str, makers: Makers, checkpoint: Checkpoints, whole_model: WholeModels
) -> None:
    engines = pipeline(makers, checkpoint(family))
    run_prefill(engines, PROMPT, CHUNKS)
    for asked, kept in ((600, 600), (599, 520), (519, 270), (270, 270)):
        assert [engine.fork(ONE, TWO, asked) for engine in engines] == [kept] * len(engines)
        assert_goes_on(engines, TWO, kept, whole_model(family))
    assert [engine.fork(ONE, TWO, 269) for engine in engines] == [0] * len(engines)
    for asked, kept in ((601, 600), (530, 520), (300, 270)):
        assert [engine.trim(ONE, asked) for engine in engines] == [kept] * len(engines)
        assert [engine.length(ONE) for engine in engines] == [kept] * len(engines)
        assert_goes_on(engines, ONE, kept, whole_model(family))
    assert [engine.trim(ONE, 200) for engine in engines] == [0] * len(engines)
    assert [engine.capacity().sequences for engine in engines] == [0] * len(engines)


@pytest.mark.parametrize("makers", MAKERS[:2])
@pytest.mark.parametrize("family", STATE_FAMILIES)
def test_rows_that_share_steps_have_snapshots_of_their_own(
    family: str, makers: Makers, checkpoint: Checkpoints, whole_model: WholeModels
) -> None:
    """Three that pass 256 in different steps, and one that has its snapshot from a fork."""
    engines = pipeline(makers, checkpoint(family))
    starts = {ONE: 250, TWO: 255, THREE: 253}
    for seq, start in starts.items():
        run_prefill(engines, [seq, *PROMPT[1:start]], seq=seq)
    for ahead in range(8):
        run_step(engines, [row(seq, start + ahead, [PROMPT[start + ahead]]) for seq, start in starts.items()])
    four = SequenceId(4)
    assert [engine.fork(THREE, four, 261) for engine in engines] == [261]
    for seq, first in ((ONE, 1), (TWO, 2), (THREE, 3), (four, 3)):
        assert [engine.trim(seq, 257) for engine in engines] == [256]
        found = run_step(engines, [row(seq, 256, OTHER)])[0]
        expected = whole_model(family).logits([first, *PROMPT[1:256], *OTHER])[-1]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("makers", MAKERS[:2])
def test_a_step_that_fails_leaves_no_snapshot(
    makers: Makers, checkpoint: Checkpoints, whole_model: WholeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = pipeline(makers, checkpoint("qwen3_next"))
    run_prefill(engines, PROMPT[:250])

    def failing(*_: object, **__: object) -> object:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(recurrent._Past, "update_recurrent_state", failing)
        patch.setattr(StateCache, "advance", failing)
        with pytest.raises(MemoryError):
            run_step(engines, [row(1, 250, random_prompt(20, seed=7))])
    assert [engine.fork(ONE, TWO, 260) for engine in engines] == [250]
    run_step(engines, [row(1, 250, PROMPT[250:270])])
    run_step(engines, [row(1, 270, PROMPT[270:280])])
    assert [engine.trim(ONE, 275) for engine in engines] == [270]
    assert_goes_on(engines, ONE, 270, whole_model("qwen3_next"))


@pytest.mark.parametrize("makers", MAKERS[:2])
def test_snapshots_are_bounded_however_long_the_sequence(makers: Makers, checkpoint: Checkpoints) -> None:
    (engine,) = engines = pipeline(makers, checkpoint("lfm2"))
    run_prefill(engines, random_prompt(1020, seed=5), range(160, 1020, 100))
    inputs = 3 if makers == (TorchEngine,) else 2  # of the convolution's three, MLX does not keep the newest
    state_bytes = 4 * inputs * 64 * 4  # layers, inputs, width, float32
    token_bytes = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, size, float32
    assert engine.capacity().kv_bytes == 1024 * token_bytes + (1 + SNAPSHOTS_MAX) * state_bytes


def _lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WaysBack, "snapshot_at", lambda self, position: None)


def _of_the_first_row(patch: pytest.MonkeyPatch) -> None:
    copied = Lane.copied_state
    patch.setattr(Lane, "copied_state", lambda self, layer, row: copied(self, layer, 0))


def _changed_since(patch: pytest.MonkeyPatch) -> None:
    """The library's steps change states in place; without copies, a snapshot's too."""
    start = recurrent._Past.__init__

    def share(self: recurrent._Past, state: object) -> None:
        start(self, state)  # type: ignore[arg-type]
        if state is not None:
            self._window, self._matrix = state.window, state.matrix  # type: ignore[attr-defined]

    patch.setattr(recurrent._Past, "__init__", share)


@pytest.mark.parametrize(
    ("mutate", "makers"),
    [
        (_lost, (TorchEngine,)),
        (_lost, (MlxEngine,)),
        (_of_the_first_row, (MlxEngine,)),
        (_changed_since, (TorchEngine,)),
    ],
)
def test_mutants_fail_the_check(
    mutate: Callable[[pytest.MonkeyPatch], None],
    makers: Makers,
    checkpoint: Checkpoints,
    whole_model: WholeModels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test_rows_that_share_steps_have_snapshots_of_their_own("qwen3_next", makers, checkpoint, whole_model)
