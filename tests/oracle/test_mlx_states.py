"""Layers with a state in place of keys and values, on the MLX engine: exact, in batches too."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint
from cluster.rewinding import SNAPSHOT_TOKENS, Rewind
from cluster.types import SequenceId
from node.engines.mlx import experts, seating, weights
from node.engines.mlx.arguments import read_arguments
from node.engines.mlx.positions import StateCache
from tests.oracle.mlx_reference import mlx_reference
from tests.oracle.pipelines import greedy, row, run_prefill, run_step
from tests.oracle.reference import random_prompt
from tests.oracle.test_mlx_engine import CUTS, assert_equal, assert_ragged_batch_equal, mlx_pipeline

Checkpoints = Callable[[str], Path]
FAMILIES = ("lfm2", "qwen3_next", "qwen3_5", "qwen3_5_moe")
ONE, TWO, THREE = SequenceId(1), SequenceId(2), SequenceId(3)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_and_logits_equal_the_whole_model(
    family: str, cuts: tuple[int, ...], checkpoint: Checkpoints
) -> None:
    expected = mlx_reference(checkpoint(family))
    engines = mlx_pipeline(checkpoint(family), cuts)
    assert_equal(*greedy(engines, expected.prompt, len(expected.ids)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_cuts_give_the_same_logits(family: str, checkpoint: Checkpoints) -> None:
    """Chunks shorter than a convolution's memory among them."""
    expected = mlx_reference(checkpoint(family))
    engines = mlx_pipeline(checkpoint(family), (2, 4))
    for seq, chunks in enumerate([(1,), (39,), (20,), (1, 2, 3, 5), (37, 38)]):
        assert_equal(*greedy(engines, expected.prompt, 2, chunks=chunks, seq=seq), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_ragged_batch_do_not_see_each_other(family: str, checkpoint: Checkpoints) -> None:
    expected = [mlx_reference(checkpoint(family), prompt_tokens) for prompt_tokens in (5, 23, 40)]
    assert_ragged_batch_equal(mlx_pipeline(checkpoint(family), (1, 3)), expected, chunk=9)


@pytest.mark.parametrize("family", FAMILIES)
def test_before_its_first_snapshot_a_sequence_is_forked_where_it_ends_and_nowhere_else(
    family: str, checkpoint: Checkpoints
) -> None:
    expected = mlx_reference(checkpoint(family))
    engines = mlx_pipeline(checkpoint(family), (2,))  # the first stage has states alone
    run_prefill(engines, expected.prompt[:30], seq=ONE)
    for engine in engines:
        assert engine.rewind == Rewind(every=SNAPSHOT_TOKENS)
        assert engine.fork(ONE, THREE, 29) == 0 == engine.length(THREE)
        assert engine.fork(ONE, TWO, 30) == 30
    run_prefill(engines, random_prompt(20, seed=2), seq=ONE, start=30)  # the source goes elsewhere
    logits = run_prefill(engines, expected.prompt[30:], seq=TWO, start=30)
    assert_equal([int(logits.argmax())], logits[None], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_sequence_begins_again_on_every_stage(family: str, checkpoint: Checkpoints) -> None:
    """The stage that only attends could keep more, but then stages would not agree."""
    expected = mlx_reference(checkpoint(family))
    engines = mlx_pipeline(checkpoint(family), (2, 3))
    run_prefill(engines, expected.prompt[:30], seq=ONE)
    assert [engine.trim(ONE, 20) for engine in engines] == [0, 0, 0]
    assert [engine.capacity().sequences for engine in engines] == [0, 0, 0]
    assert_equal(*greedy(engines, expected.prompt, 3, seq=ONE), expected)


def test_a_step_that_fails_before_the_device_is_asked_changes_no_state(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = mlx_reference(checkpoint("lfm2"))
    (engine,) = engines = mlx_pipeline(checkpoint("lfm2"))
    run_prefill(engines, expected.prompt[:20], seq=ONE)
    advance, calls = StateCache.advance, 0

    def failing(self: StateCache, tokens: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("no memory for the graph")
        advance(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(StateCache, "advance", failing)
        with pytest.raises(RuntimeError, match="graph"):
            run_step(engines, [row(1, 20, expected.prompt[20:])])
    assert engine.length(ONE) == 20
    logits = run_prefill(engines, expected.prompt[20:], seq=ONE, start=20)
    assert_equal([int(logits.argmax())], logits[None], expected)


def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a state's arrays stays as it was in every step but the first."""
    store = StateCache.__setitem__

    def keep(self: StateCache, index: int, array: mx.array) -> None:
        if self[index] is None:
            store(self, index, array)

    monkeypatch.setattr(StateCache, "__setitem__", keep)


def _of_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """When sequences move to a new lane, states stay in the order of the old one."""
    part = seating._part

    def first_row(origin: Any, layer: int) -> Any:
        arrays, place, length = part(origin, layer)
        is_state = bool(arrays) and arrays[0].ndim == 3
        return arrays, 0 if is_state else place, length

    monkeypatch.setattr(seating, "_part", first_row)


@pytest.mark.parametrize("mutate", [_forgotten, _of_another_row])
@pytest.mark.parametrize("family", FAMILIES)
def test_mutants_fail_the_ragged_check(
    family: str, mutate: Callable[[pytest.MonkeyPatch], None], checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [mlx_reference(checkpoint(family), prompt_tokens) for prompt_tokens in (5, 23, 40)]
    engines = mlx_pipeline(checkpoint(family))
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_ragged_batch_equal(engines, expected, chunk=9)


def test_a_slice_that_cannot_tell_how_norms_are_stored_fails_the_check(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that only attends, without another layer's convolution to go by."""
    expected = mlx_reference(checkpoint("qwen3_5"))
    monkeypatch.setattr(weights, "_witness", lambda checkpoint, family, lazy: {})
    engines = mlx_pipeline(checkpoint("qwen3_5"), (2, 3))
    with pytest.raises(AssertionError):
        assert_equal(*greedy(engines, expected.prompt, len(expected.ids)), expected)


def test_gates_taken_for_the_other_half_of_an_expert_fail_the_check(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = mlx_reference(checkpoint("qwen3_5_moe"))
    in_stacks = experts.in_stacks

    def swapped(*args: Any) -> dict[str, mx.array]:
        halves = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        pattern = re.compile(r"(?<=switch_mlp\.)(gate_proj|up_proj)")
        return {pattern.sub(lambda match: halves[match[0]], name): array for name, array in in_stacks(*args).items()}

    monkeypatch.setattr(weights, "in_stacks", swapped)
    engines = mlx_pipeline(checkpoint("qwen3_5_moe"))
    with pytest.raises(AssertionError):
        assert_equal(*greedy(engines, expected.prompt, len(expected.ids)), expected)


@pytest.mark.parametrize("lost", [0, 3])
def test_experts_with_one_missing_are_refused(lost: int) -> None:
    stacks = experts.Stacks("mlp.experts.", "mlp.switch_mlp.")
    found = {f"model.layers.0.mlp.experts.{index}.up_proj.weight": mx.zeros((2, 2)) for index in range(5)}
    del found[f"model.layers.0.mlp.experts.{lost}.up_proj.weight"]
    with pytest.raises(ModelError, match="some of its experts are missing"):
        experts.in_stacks(found, stacks)


SIZES = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
NEXT = {**EXPERTS, **HEADS, "linear_key_head_dim": 16, "linear_value_head_dim": 12, "linear_conv_kernel_dim": 4}


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("lfm2", {"layer_types": ["conv"] * 6}, "no layer attends"),
        ("lfm2", {"layer_types": ["conv", "mamba"] * 3}, "conv"),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 3, "block_ff_dim": 99}, "block_ff_dim is 99"),
        ("qwen3_next", {**NEXT, "mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_5_moe_text", {**NEXT, "norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_next", {**NEXT, "layer_types": ["full_attention", "linear_attention"] * 3}, "regularly"),
        ("qwen3_next", {**NEXT, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_what_mlx_lm_would_compute_otherwise_is_refused(family: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_arguments(Checkpoint(Path("model"), {"model_type": family, **SIZES, **config}, {}))


def test_memory_is_counted_with_its_states(checkpoint: Checkpoints) -> None:
    """Two layers of keys and values for each position, four states whatever the length."""
    (engine,) = engines = mlx_pipeline(checkpoint("lfm2"))
    run_prefill(engines, random_prompt(20, seed=0), seq=ONE)
    state_bytes = 4 * 2 * 64 * 4  # layers, inputs that a convolution remembers, width, float32
    token_bytes = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, size, float32
    kept = engine.capacity().kv_bytes - state_bytes
    assert kept % token_bytes == 0
    assert 20 <= kept // token_bytes <= 112
