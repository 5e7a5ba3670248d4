"""Neighbours in a step change nothing: whatever a format's products are, a sequence draws with others what it draws
alone, greedily and with a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cluster.steps import Draw, Sampling
from cluster.types import SequenceId
from node.engine import Engine
from node.sampling import draw
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import load_pipeline, ragged, stage_specs
from tests.oracle.reference import Reference, assert_same, random_prompt

SEEDED = Draw(Sampling(seed=1, temperature=8.0, top_k=40, top_p=0.95), prompt_tokens=0)
"""So warm that it draws other tokens than the likeliest."""


def assert_company_changes_nothing(
    makers: Sequence[Callable[[], Engine]], folder: Any, expected: Reference, **spec: Any
) -> None:
    """The checkpoint in `folder` over as many stages as `makers`, cut behind their first layers: `expected`'s prompt
    beside two others, which come while it is computed; then all three draw in the same steps."""
    prompts = [expected.prompt, random_prompt(20, seed=20), random_prompt(7, seed=7)]
    engines = load_pipeline(makers, stage_specs(folder, tuple(range(1, len(makers))), **spec))
    count = len(expected.ids)
    ids, logits = ragged(engines, prompts, count)[0]
    assert_same(ids, logits, expected, tolerance=TOLERANCE)
    texts = []
    for company in (prompts, prompts[:1]):
        for engine in engines:
            for seq in range(len(prompts)):
                engine.drop(SequenceId(seq))
        texts.append(ragged(engines, company, count, lambda logits, tokens: draw(logits, SEEDED, tokens))[0][0])
    assert texts[0] == texts[1] != ids
