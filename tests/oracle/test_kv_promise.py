"""What a plan promises for keys, values and states is what engines take: never more, and not much less when full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.limits import SEQUENCES_MAX
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.placement import sequences_max, stage_cost
from cluster.placement.costs import KV_AHEAD
from cluster.types import LayerRange, SequenceId
from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from tests.checkpoints import FAMILIES, MORE_FAMILIES, STATE_FAMILIES, make_checkpoint
from tests.oracle.pipelines import load_pipeline, row, stage_specs
from tests.oracle.reference import random_prompt

CONTEXT, USERS = 512, 2
LEAST = 0.85
WINDOWED = {"gemma2", "gemma3", "gpt_oss", "olmo3", "gemma4", "gemma4_small", "windows everywhere"}


def folder_of(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    if family == "windows everywhere":
        return make_checkpoint("mistral", tmp_path, sliding_window=64)
    return checkpoint(family)


def held_bytes(engine: Engine, lengths: list[int]) -> list[int]:
    """After each step while so many sequences grow together until they are full; then all of them are dropped."""
    prompt = random_prompt(max(lengths), seed=1)
    held = []
    for start in range(0, max(lengths), 100):
        rows = [
            row(seq, start, prompt[start : min(start + 100, length)], draw=False)
            for seq, length in enumerate(lengths)
            if start < length
        ]
        engine.step(rows, None)
        held.append(engine.capacity().kv_bytes)
    for seq in range(len(lengths)):
        engine.drop(SequenceId(seq))
    return held


@pytest.mark.parametrize("maker", [TorchEngine, MlxEngine])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *STATE_FAMILIES, "windows everywhere"])
def test_full_engines_hold_what_the_plan_says(
    family: str, maker: Callable[[], Engine], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A few sequences of full length, as many as there may be, which together are as long, and some of any length. What
    has grown ahead of its tokens comes out of the eighth that plans leave for that."""
    folder = folder_of(family, checkpoint, tmp_path)
    facts = read_facts(open_checkpoint(folder))
    specs = stage_specs(folder, (), kv_tokens=CONTEXT * USERS, context_tokens=CONTEXT)
    (engine,) = load_pipeline([maker], specs)
    cost = stage_cost(
        facts, LayerRange(0, facts.layer_count), engine.backend, context=CONTEXT, users=USERS, on_cpu=True
    )
    many = min(sequences_max(facts, CONTEXT, USERS), 8)
    loads = [held_bytes(engine, [CONTEXT * USERS // count] * count) for count in (USERS, many)]
    loads.append(held_bytes(engine, [CONTEXT, 300, 150, 62]))
    assert max(max(load) for load in loads) <= cost.kv_bytes + cost.kv_bytes // KV_AHEAD
    assert max(load[-1] for load in loads) >= LEAST * cost.kv_bytes


def test_without_their_windows_and_states_the_promises_would_be_others(checkpoint: Callable[[str], Path]) -> None:
    """The checkpoints above are such that forgetting, or counting it, makes more of a difference than is allowed."""
    for family in WINDOWED - {"windows everywhere"}:
        facts = read_facts(open_checkpoint(checkpoint(family)))
        layers = LayerRange(0, facts.layer_count)
        cost = stage_cost(facts, layers, min(facts.backends), context=CONTEXT, users=USERS, on_cpu=True)
        whole = sum(layer.kv_bytes_per_token for layer in facts.layers) * CONTEXT * USERS
        assert cost.kv_bytes < LEAST * whole
        assert sequences_max(facts, CONTEXT, USERS) < SEQUENCES_MAX
