"""Layers that look back a window keep it and a little more, on both engines: answers stay what they were, memory does
not grow, and sequences go back as far on every stage as the windows allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.rewinding import REWIND_TOKENS, window_tokens_max
from node.engine import Engine
from node.engines.mlx import lane
from node.engines.mlx.engine import MlxEngine
from node.engines.mlx.positions import Positions
from node.engines.torch import attention, layer_kv
from node.engines.torch.engine import TorchEngine
from node.engines.torch.kv import SequenceCache
from tests.checkpoints import make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import load_pipeline, ragged, row, run_prefill, run_step, stage_specs
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, decisive_reference, random_prompt
from tests.oracle.test_mixed import MLX_TORCH, TORCH_MLX, Makers, assert_equal

WINDOW = 16
SETTINGS: dict[str, dict[str, object]] = {
    "gemma2": {},
    "gemma3": {},
    "gpt_oss": {},
    "olmo3": {},
    "llama4": {},
    "mistral": {"sliding_window": WINDOW},  # in every layer
    "phi3": {"sliding_window": WINDOW},
}
MAKERS = [
    pytest.param((TorchEngine,) * 3, id="torch"),
    pytest.param((MlxEngine,) * 3, id="mlx"),
    pytest.param(TORCH_MLX, id="torch-mlx"),
    pytest.param(MLX_TORCH, id="mlx-torch"),
]
CUTS = {1: (), 2: (3,), 3: (2, 3)}  # the middle one of three has one layer, which in some families sees everything
LENGTHS = (10, 70, 250)
"""Within the window, at the end of what is kept beside it, and several times beyond."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(family: str) -> Path:
        return make_checkpoint(family, tmp_path_factory.mktemp(family), **SETTINGS[family])

    return make


@pytest.fixture(scope="module")
def whole(folder_of: Callable[[str], Path]) -> Callable[[str], WholeModel]:
    return cache(lambda family: WholeModel(folder_of(family)))


@pytest.fixture(scope="module")
def answers(whole: Callable[[str], WholeModel]) -> Callable[[str], list[Reference]]:
    @cache
    def make(family: str) -> list[Reference]:
        return [
            decisive_reference(whole(family), prompt_tokens=length, count=LAST_TOKENS, tolerance=TOLERANCE)
            for length in LENGTHS
        ]

    return make


def pipeline(makers: Makers, folder: Path, **limits: int) -> list[Engine]:
    return load_pipeline(makers, stage_specs(folder, CUTS[len(makers)], **limits))


def assert_ragged(engines: list[Engine], expected: list[Reference], chunk: int) -> None:
    found = ragged(engines, [answer.prompt for answer in expected], LAST_TOKENS, chunk=chunk)
    for (ids, logits), answer in zip(found, expected, strict=True):
        assert_equal(ids, logits, answer)


def assert_goes_on(engines: list[Engine], seq: int, past: list[int], tokens: list[int], model: WholeModel) -> None:
    """The sequence holds `past`. Its next token shows what is left of that; some windows later nothing would."""
    expected = model.logits([*past, *tokens])
    for begin, end in pairwise((0, 1, 5, 30, len(tokens))):
        found = run_step(engines, [row(seq, len(past) + begin, tokens[begin:end])])[0]
        np.testing.assert_allclose(found, expected[len(past) + end - 1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("makers", MAKERS)
@pytest.mark.parametrize("family", SETTINGS)
def test_long_sequences_together_equal_the_whole_model(
    family: str, makers: Makers, folder_of: Callable[[str], Path], answers: Callable[[str], list[Reference]]
) -> None:
    """In chunks that fit beside the window, and in one that is longer than all that is kept."""
    for chunk in (40, 130):
        assert_ragged(pipeline(makers, folder_of(family)), answers(family), chunk)


def _forgets_one_too_early(patch: pytest.MonkeyPatch) -> None:
    """Beside a new position, a query needs one less than its window; here there are two less."""
    patch.setattr(layer_kv, "window_tokens_kept", lambda window: window - 1)
    patch.setattr(lane, "window_tokens_kept", lambda window: window - 2)


def _looks_back_one_less(patch: pytest.MonkeyPatch) -> None:
    attend, mask = attention._attend_sequence, Positions._mask

    def narrow_attend(*args: Any) -> object:
        window = args[4].window
        return attend(*args[:4], replace(args[4], window=window and window - 1))

    def narrow_mask(self: Positions, window: int | None, in_chunks: bool) -> object:
        seen = mask(self, window, in_chunks)
        return seen if window is None else seen & (self._keys(window)[:, :, None] > self._new()[..., None] - window + 1)

    patch.setattr(attention, "_attend_sequence", narrow_attend)
    patch.setattr(Positions, "_mask", narrow_mask)


@pytest.mark.parametrize("mutate", [_forgets_one_too_early, _looks_back_one_less])
@pytest.mark.parametrize("makers", MAKERS[:2])
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_window_off_by_one_fails_the_check(
    family: str,
    makers: Makers,
    mutate: Callable[[pytest.MonkeyPatch], None],
    folder_of: Callable[[str], Path],
    answers: Callable[[str], list[Reference]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engines = pipeline(makers, folder_of(family))
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_ragged(engines, answers(family), chunk=40)


@pytest.mark.parametrize("maker", [TorchEngine, MlxEngine])
def test_memory_stays_when_sequences_grow(maker: Callable[[], Engine], folder_of: Callable[[str], Path]) -> None:
    """Every layer of this Mistral has a window: 1.1 times (16 + 64) positions, or 80 on MLX, however long the text."""
    token_bytes = 6 * 2 * 2 * 16 * 4  # layers, keys and values, heads, size, float32
    (engine,) = pipeline((maker,), folder_of("mistral"))
    prompt = random_prompt(400, seed=0)
    for begin, end in pairwise((0, 20, 85, 100, 300, 399, 400)):
        engine.step([row(1, begin, prompt[begin:end], draw=False)], None)
        assert end * token_bytes <= engine.capacity().kv_bytes or end > 80
        assert engine.capacity().kv_bytes <= window_tokens_max(WINDOW) * token_bytes
    assert engine.capacity().kv_tokens_used == 400


@pytest.mark.parametrize(
    "makers", [MAKERS[0], MAKERS[1], pytest.param((TorchEngine, MlxEngine, TorchEngine), id="mixed")]
)
@pytest.mark.parametrize("family", ["gemma3", "phi3"])
def test_every_stage_goes_back_as_far_as_the_windows_allow(
    family: str, makers: Makers, folder_of: Callable[[str], Path], whole: Callable[[str], WholeModel]
) -> None:
    """Gemma's middle stage has a layer that keeps everything, and answers as the others do."""
    prompt, other = random_prompt(200, seed=5), random_prompt(90, seed=6)
    furthest = 200 - REWIND_TOKENS
    engines = pipeline(makers, folder_of(family))
    run_prefill(engines, prompt, (150,))
    one, two = row(1, 0, ()).seq, row(2, 0, ()).seq
    for length in (199, furthest + 1, furthest):
        assert [engine.fork(one, two, length) for engine in engines] == [length] * 3
        assert_goes_on(engines, 2, prompt[:length], other, whole(family))
    assert [engine.fork(one, two, furthest - 1) for engine in engines] == [0] * 3
    assert [engine.trim(one, furthest) for engine in engines] == [furthest] * 3
    assert_goes_on(engines, 1, prompt[:furthest], other, whole(family))
    assert [engine.trim(one, furthest) for engine in engines] == [0] * 3
    assert [engine.capacity().sequences for engine in engines] == [0] * 3


@pytest.mark.parametrize("maker", [TorchEngine, MlxEngine])
def test_a_short_sequence_goes_back_to_anywhere(
    maker: Callable[[], Engine], folder_of: Callable[[str], Path], whole: Callable[[str], WholeModel]
) -> None:
    """As long as nothing has been forgotten: up to 79 positions beside this window."""
    prompt, other = random_prompt(79, seed=5), random_prompt(90, seed=6)
    (engine,) = engines = pipeline((maker,), folder_of("mistral"))
    run_prefill(engines, prompt)
    one, two = row(1, 0, ()).seq, row(2, 0, ()).seq
    for length in (1, 10, 78):
        assert engine.fork(one, two, length) == length
        assert_goes_on(engines, 2, prompt[:length], other, whole("mistral"))
    run_prefill(engines, [7], start=79)
    assert engine.fork(one, two, 15) == 0


def test_who_forgets_what_a_rewind_needs_fails_the_check(
    folder_of: Callable[[str], Path], whole: Callable[[str], WholeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_kv, "window_tokens_kept", lambda window: window)
    monkeypatch.setattr(lane, "window_tokens_kept", lambda window: window)
    for makers in ((TorchEngine,) * 3, (MlxEngine,) * 3):
        with pytest.raises(AssertionError):
            test_every_stage_goes_back_as_far_as_the_windows_allow("phi3", makers, folder_of, whole)


@pytest.mark.parametrize("new_tokens", [1, 20, 150])
def test_a_torch_step_that_fails_midway_forgets_nothing(
    new_tokens: int,
    folder_of: Callable[[str], Path],
    whole: Callable[[str], WholeModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though tensors have moved and grown in the layers that it reached."""
    prompt, other = random_prompt(200, seed=5), random_prompt(new_tokens, seed=6)
    engines = pipeline((TorchEngine,), folder_of("gemma3"))
    run_prefill(engines, prompt)
    write = SequenceCache.write

    def failing(self: SequenceCache, layer: int, *args: object) -> object:
        if layer == 4:
            raise MemoryError
        return write(self, layer, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(SequenceCache, "write", failing)
        for _ in range(3):
            with pytest.raises(MemoryError):
                run_step(engines, [row(1, 200, random_prompt(new_tokens, seed=7))])
    found = run_step(engines, [row(1, 200, other)])[0]
    np.testing.assert_allclose(found, whole("gemma3").logits([*prompt, *other])[-1], rtol=0, atol=TOLERANCE)
