"""Matrices of integers in shared steps: neighbours change nothing, neither greedy answers nor seeded ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra [torch]")
pytest.importorskip("mlx_lm", reason="needs the extra [mlx]")

from cluster.steps import Draw, Sampling
from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from node.sampling import draw
from tests.integer_checkpoints import LAYOUTS
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import load_pipeline, ragged, row, stage_specs
from tests.oracle.reference import Reference, assert_same, random_prompt

SEEDED = Draw(Sampling(seed=1, temperature=8.0, top_k=40, top_p=0.95), prompt_tokens=0)


@pytest.mark.parametrize("makers", [(TorchEngine,), (MlxEngine,), (TorchEngine, MlxEngine)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_in_a_ragged_batch_are_those_without_neighbours(
    layout: str, makers: tuple[type, ...], integers: Callable[[str, str], tuple[Path, Reference]]
) -> None:
    packed, expected = integers("llama", layout)
    prompts = [expected.prompt, random_prompt(7, seed=7), random_prompt(23, seed=23)]
    engines = load_pipeline(makers, stage_specs(packed, (1,) * (len(makers) - 1)))
    count = len(expected.ids)
    ids, logits = ragged(engines, prompts, count)[0]
    assert_same(ids, logits, expected, tolerance=TOLERANCE)
    texts = []
    for company in (prompts, prompts[:1]):
        for engine in engines:
            for seq in range(len(prompts)):
                engine.drop(row(seq, 0, ()).seq)
        texts.append(ragged(engines, company, count, lambda logits, tokens: draw(logits, SEEDED, tokens))[0][0])
    assert texts[0] == texts[1] != ids
