"""Steps that overlap on the MLX engine give what they would give one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from cluster.types import SequenceId
from node.engines.mlx.engine import MlxEngine
from tests.oracle.mlx_counts import counted
from tests.oracle.mlx_reference import MLX_TOLERANCE, whole_mlx_model
from tests.oracle.pipelines import load_pipeline, row, run_prefill, stage_specs
from tests.oracle.reference import random_prompt
from tests.oracle.test_mlx_counts import keys_and_values

Checkpoints = Callable[[str], Path]
FAMILIES = ("llama", "gemma3", "qwen3_moe", "deepseek_v3", "qwen3_next")


def prefilled(folder: Path, count: int) -> tuple[MlxEngine, list[list[int]]]:
    """An engine that holds all but the last three tokens of each prompt."""
    (engine,) = load_pipeline([MlxEngine], stage_specs(folder, (), kv_tokens=32 * 512))
    assert isinstance(engine, MlxEngine)
    prompts = [random_prompt(20 + 3 * seq, seed=seq) for seq in range(count)]
    for seq, prompt in enumerate(prompts):
        run_prefill([engine], prompt[:-3], seq=seq)
    return engine, prompts


@pytest.mark.parametrize("together", [False, True], ids=["two lanes", "one lane"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_companies_take_turns_without_waiting(family: str, together: bool, checkpoint: Checkpoints) -> None:
    engine, prompts = prefilled(checkpoint(family), 4)
    companies = [[0, 1], [2, 3]]
    if together:  # they have decoded as one company
        engine.step([row(seq, len(prompt) - 3, prompt[-3:-2]) for seq, prompt in enumerate(prompts)], None)
    turns = [(company, at) for at in ((-2, -1) if together else (-3, -2, -1)) for company in companies]
    logits: dict[int, object] = {}
    unfinished = []
    for company, at in turns:
        rows = [row(seq, len(prompts[seq]) + at, [prompts[seq][at]]) for seq in company]
        unfinished.append((company, engine.begin(rows, None)))
        if len(unfinished) == 2:
            seqs, finish = unfinished.pop(0)
            logits |= dict(zip(seqs, finish(), strict=True))
    for seqs, finish in unfinished:
        logits |= dict(zip(seqs, finish(), strict=True))
    for seq, prompt in enumerate(prompts):
        expected = whole_mlx_model(checkpoint(family)).logits(prompt)[-1]
        np.testing.assert_allclose(logits[seq], expected, rtol=0, atol=MLX_TOLERANCE)


def test_steps_that_overlap_write_into_their_lanes_in_place(checkpoint: Checkpoints) -> None:
    engine, prompts = prefilled(checkpoint("llama"), 4)

    def begin(at: int, company: list[int]) -> Callable[[], object]:
        return engine.begin([row(seq, len(prompts[seq]) + at, [prompts[seq][at]]) for seq in company], None)

    for company in ([0, 1], [2, 3]):
        begin(-3, company)()
    before = keys_and_values(engine, 4)
    first, second = begin(-2, [0, 1]), begin(-2, [2, 3])
    first()
    third = begin(-1, [0, 1])
    second()
    third()
    assert keys_and_values(engine, 4) == before


@pytest.mark.parametrize("together", [False, True], ids=["two lanes", "one lane"])
def test_a_step_waits_for_another_one_in_its_lane_and_for_no_other(
    together: bool, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the device still reads a lane, nothing would be written there in place."""
    engine, prompts = prefilled(checkpoint("llama"), 4)
    for company in [[0, 1, 2, 3]] if together else [[0, 1], [2, 3]]:
        engine.step([row(seq, len(prompts[seq]) - 3, [7]) for seq in company], None)
    before = keys_and_values(engine, 4)
    with counted(monkeypatch) as counts:
        first = engine.begin([row(seq, len(prompts[seq]) - 2, [7]) for seq in (0, 1)], None)
        assert counts.waits == 0
        second = engine.begin([row(seq, len(prompts[seq]) - 2, [7]) for seq in (2, 3)], None)
        assert counts.waits == together
    first()
    second()
    assert keys_and_values(engine, 4) == before


def test_a_step_whose_sequences_another_one_lost_fails(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device fails with the first of two steps in one lane; the second one's past was there too."""
    engine, prompts = prefilled(checkpoint("llama"), 4)
    engine.step([row(seq, len(prompt) - 3, prompt[-3:-2]) for seq, prompt in enumerate(prompts)], None)
    first = engine.begin([row(seq, len(prompts[seq]) - 2, [7]) for seq in (0, 1)], None)
    second = engine.begin([row(seq, len(prompts[seq]) - 2, [7]) for seq in (2, 3)], None)
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", _raise_out_of_memory)
        with pytest.raises(RuntimeError, match="memory"):
            first()
    with pytest.raises(RuntimeError, match="lost"):
        second()
    assert [engine.length(SequenceId(seq)) for seq in range(4)] == [0, 0, 0, 0]


def _raise_out_of_memory(*_: object) -> None:
    raise RuntimeError("out of memory")
