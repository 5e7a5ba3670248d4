"""What an MLX step costs: one evaluation, of as much for many sequences as for a few, and no cache moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.types import SequenceId
from node.engines.mlx.engine import MlxEngine
from tests.oracle.mlx_counts import addresses, counted
from tests.oracle.pipelines import load_pipeline, row, run_prefill, stage_specs
from tests.oracle.reference import random_prompt

Checkpoints = Callable[[str], Path]
FAMILIES = ("llama", "gemma3", "qwen3_moe", "deepseek_v3", "qwen3_next")

RAGGED_OPERATIONS_MAX = 4
"""By layer, for rows of different lengths: a mask where one row needs none, and where it is made."""


def loaded(folder: Path) -> MlxEngine:
    (engine,) = load_pipeline([MlxEngine], stage_specs(folder, (), kv_tokens=32 * 512))
    assert isinstance(engine, MlxEngine)
    return engine


def prefilled(engine: MlxEngine, count: int) -> list[int]:
    """Sequences of different lengths, which have decoded together once; returns how long they are."""
    lengths = [20 + 3 * seq for seq in range(count)]
    for seq, length in enumerate(lengths):
        run_prefill([engine], random_prompt(length, seed=seq), seq=seq)
    return decoded(engine, range(count), lengths)


def decoded(engine: MlxEngine, seqs: Sequence[int], lengths: Sequence[int]) -> list[int]:
    engine.step([row(seq, lengths[seq], [5]) for seq in seqs], None)
    return [length + (seq in seqs) for seq, length in enumerate(lengths)]


def lanes(engine: MlxEngine, count: int) -> list[int]:
    """Where the keys, values and states of the first sequences lie."""
    cache = engine._require().cache
    return addresses([cache.lane_of(SequenceId(seq)).arrays for seq in range(count)])


def keys_and_values(engine: MlxEngine, count: int) -> list[int]:
    """The same without states, of which every step makes new ones."""
    cache = engine._require().cache
    return addresses([a for seq in range(count) for a in cache.lane_of(SequenceId(seq)).arrays if a[0].ndim == 4])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_is_one_evaluation_of_as_much_for_sixteen_sequences_as_for_eight(
    family: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for count in (1, 8, 16):
        engine = loaded(checkpoint(family))
        lengths = prefilled(engine, count)
        before = lanes(engine, count)
        with counted(monkeypatch) as counts:
            decoded(engine, range(count), lengths)
        assert (counts.waits, counts.started) == (1, 1)
        if family != "qwen3_next":
            assert lanes(engine, count) == before, "a step writes into its lanes in place"
        found[count], waited_for = counts.operations
        assert waited_for == 0
        layers = engine._require().spec.layer_count
    assert found[16] == found[8] <= found[1] + RAGGED_OPERATIONS_MAX * layers


@pytest.mark.parametrize("family", FAMILIES)
def test_when_one_of_eight_ends_the_others_stay(
    family: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = loaded(checkpoint(family))
    lengths = prefilled(engine, 8)
    before = engine.capacity().kv_bytes
    engine.drop(SequenceId(3))
    with counted(monkeypatch) as counts:
        decoded(engine, [0, 1, 2, 4, 5, 6, 7], lengths)
    assert (counts.waits, counts.started) == (1, 1)
    assert engine.capacity().kv_bytes == before


@pytest.mark.parametrize("family", FAMILIES)
def test_who_takes_the_place_of_one_that_ended_is_copied_while_the_host_goes_on(
    family: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied alone: the others' keys and values lie where they lay."""
    engine = loaded(checkpoint(family))
    lengths = [*prefilled(engine, 8), 30]
    engine.drop(SequenceId(7))
    run_prefill([engine], random_prompt(30, seed=8), seq=8)
    before = keys_and_values(engine, 7)
    with counted(monkeypatch) as counts:
        decoded(engine, [0, 1, 2, 3, 4, 5, 6, 8], lengths)
    assert (counts.waits, counts.started) == (1, 2)
    assert keys_and_values(engine, 7) == before


def test_a_prefill_chunk_beside_decode_rows_is_one_forward_more_in_the_same_evaluation(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = loaded(checkpoint("llama"))
    lengths = prefilled(engine, 8)
    run_prefill([engine], random_prompt(30, seed=8), seq=8)
    rows = [row(seq, lengths[seq], [5]) for seq in range(8)]
    before = lanes(engine, 9)
    with counted(monkeypatch) as counts:
        engine.step([*rows, row(8, 30, random_prompt(30, seed=9))], None)
    assert (counts.waits, counts.started) == (1, 1)
    assert lanes(engine, 9) == before
