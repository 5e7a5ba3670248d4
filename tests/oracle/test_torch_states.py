"""Layers that keep a state in place of keys and values: what a fork, a trim and a failed step leave of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cluster.rewinding import SNAPSHOT_TOKENS, Rewind
from node.engines.torch.kv import SequenceCache
from tests.checkpoints import STATE_FAMILIES
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import row, run_prefill, run_step
from tests.oracle.reference import WholeModel, random_prompt
from tests.oracle.test_torch_engine import Checkpoints, torch_pipeline


@pytest.mark.parametrize("family", STATE_FAMILIES)
def test_before_its_first_snapshot_a_sequence_is_copied_whole_or_not_at_all(
    family: str, checkpoint: Checkpoints, whole_model: Callable[[str], WholeModel]
) -> None:
    """Also by a stage that holds none of the states, or stages would disagree."""
    prompt, other = random_prompt(30, seed=5), random_prompt(8, seed=6)
    engines = torch_pipeline(checkpoint(family), (2, 3))  # the middle one has only a layer that attends
    run_prefill(engines, prompt)
    source, twin, third = (row(seq, 0, ()).seq for seq in (1, 2, 3))
    for engine in engines:
        assert engine.rewind == Rewind(every=SNAPSHOT_TOKENS)
        assert engine.fork(source, third, 29) == 0
        assert engine.fork(source, twin, 30) == 30
    run_step(engines, [row(1, 30, random_prompt(5, seed=9))])
    found = run_step(engines, [row(2, 30, other)])[0]
    np.testing.assert_allclose(found, whole_model(family).logits(prompt + other)[-1], rtol=0, atol=TOLERANCE)
    for engine in engines:
        assert engine.trim(twin, 30) == 0
        assert engine.length(twin) == 0


@pytest.mark.parametrize("new_tokens", [1, 9])
@pytest.mark.parametrize("family", STATE_FAMILIES)
def test_a_step_that_fails_midway_leaves_states_as_they_were(
    family: str,
    new_tokens: int,
    checkpoint: Checkpoints,
    whole_model: Callable[[str], WholeModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt, other = random_prompt(30, seed=5), random_prompt(new_tokens, seed=6)
    engine = torch_pipeline(checkpoint(family))[0]
    run_prefill([engine], prompt)
    write = SequenceCache.write

    def failing(self: SequenceCache, layer: int, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == 5:
            raise MemoryError
        return write(self, layer, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(SequenceCache, "write", failing)
        with pytest.raises(MemoryError):
            run_step([engine], [row(1, 30, random_prompt(new_tokens, seed=7))])
    found = run_step([engine], [row(1, 30, other)])[0]
    np.testing.assert_allclose(found, whole_model(family).logits(prompt + other)[-1], rtol=0, atol=TOLERANCE)
