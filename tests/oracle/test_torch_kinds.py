"""What a family's layers can be asked for besides its first checkpoint's: windows, blocks, spellings, rotations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from node.engines.torch import attention
from tests.checkpoints import make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, run_prefill
from tests.oracle.reference import LAST_TOKENS, WholeModel, decisive_reference, random_prompt
from tests.oracle.test_torch_engine import Checkpoints, assert_equal, torch_pipeline

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 50_000.0,
    "original_max_position_embeddings": 128,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 6.0, 8.0, 10.0],
}
"""Of 16 elements of a head 12 are rotated, as 6 pairs, as Phi-4 mini has it."""


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_windows_of_all_layers_equal_the_whole_models(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, sliding_window=16)
    prompt = random_prompt(60, seed=3)
    expected = WholeModel(folder).logits(prompt)[-1]
    found = run_prefill(torch_pipeline(folder, (2, 4)), prompt, (13, 30))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(run_prefill(torch_pipeline(folder), prompt[-16:]) - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_written_scores_come_in_blocks(
    family: str, checkpoint: Checkpoints, whole_model: Callable[[str], WholeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SCORES_MAX", 4 * 60 * 7)
    prompt = random_prompt(60, seed=1)
    expected = whole_model(family).logits(prompt)[-1]
    found = run_prefill(torch_pipeline(checkpoint(family)), prompt, (21,))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rank", [24, None])
def test_every_spelling_of_latent_attention_is_computed(rank: int | None, interleaved: bool, tmp_path: Path) -> None:
    folder = make_checkpoint("deepseek_v3", tmp_path, q_lora_rank=rank, rope_interleave=interleaved)
    prompt = random_prompt(40, seed=3)
    found = run_prefill(torch_pipeline(folder, (2, 4)), prompt, (13,))
    np.testing.assert_allclose(found, WholeModel(folder).logits(prompt)[-1], rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def long_rope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_rope_checkpoint(tmp_path_factory.mktemp("phi3_long"))


def long_rope_checkpoint(folder: Path, **changed: object) -> Path:
    return make_checkpoint(
        "phi3",
        folder,
        rope_parameters=LONG_ROPE | changed,
        original_max_position_embeddings=LONG_ROPE["original_max_position_embeddings"],
    )


def test_longrope_equals_the_whole_model_below_its_original_context(long_rope: Path) -> None:
    expected = decisive_reference(WholeModel(long_rope), prompt_tokens=40, count=LAST_TOKENS, tolerance=TOLERANCE)
    for cuts in ((), (2, 4)):
        engines = torch_pipeline(long_rope, cuts, context_tokens=128)
        found = greedy(engines, expected.prompt, LAST_TOKENS, chunks=(7, 30))
        assert_equal(*found, expected)


def test_longrope_is_planned_and_loaded_for_its_original_context_alone(long_rope: Path) -> None:
    facts = read_facts(open_checkpoint(long_rope))
    assert facts.context_tokens == 128
    with pytest.raises(ModelError, match="longrope change for all positions when a sequence passes 128"):
        torch_pipeline(long_rope, context_tokens=129)


@pytest.mark.parametrize("setting", ["short_factor", "attention_factor"])
def test_a_longrope_that_stretches_otherwise_fails_the_check(setting: str, long_rope: Path, tmp_path: Path) -> None:
    """The other set of factors, or another scale."""
    wrong = {"short_factor": LONG_ROPE["long_factor"], "attention_factor": 1.5}[setting]
    other = long_rope_checkpoint(tmp_path, **{setting: wrong})
    prompt = random_prompt(40, seed=0)
    found = run_prefill(torch_pipeline(other, context_tokens=128), prompt)
    assert np.abs(found - WholeModel(long_rope).logits(prompt)[-1]).max() > 20 * TOLERANCE


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_moe_block": False, "attention_k_eq_v": False},
        {"global_head_dim": 16, "num_global_key_value_heads": None, "use_bidirectional_attention": "vision"},
    ],
    ids=["dense", "alike"],
)
def test_every_arrangement_of_varied_heads_is_computed(fields: dict[str, object], tmp_path: Path) -> None:
    folder = make_checkpoint("gemma4", tmp_path, **fields)
    prompt = random_prompt(40, seed=3)
    found = run_prefill(torch_pipeline(folder, (2, 4)), prompt, (13,))
    np.testing.assert_allclose(found, WholeModel(folder).logits(prompt)[-1], rtol=0, atol=TOLERANCE)
