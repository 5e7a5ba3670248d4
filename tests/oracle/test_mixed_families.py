"""The other families in pipelines of torch and MLX stages: what the whole model computes, in either order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from tests.checkpoints import MORE_FAMILIES, STATE_FAMILIES, make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.mlx_reference import experts_in_stacks
from tests.oracle.pipelines import greedy, load_pipeline, ragged, run_prefill, stage_specs
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, decisive_reference, random_prompt
from tests.oracle.test_mixed import MIXED, MLX_TORCH, TORCH_MLX, Makers, assert_equal, pipeline
from tests.oracle.test_mlx_families import BEYOND_MLX_LM
from tests.oracle.test_torch_load import copied

Checkpoints = Callable[[str], Path]


@pytest.mark.parametrize("makers", MIXED[2:])
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_greedy_text_and_logits_equal_the_whole_model(
    family: str, makers: Makers, checkpoint: Checkpoints, reference: Callable[..., Reference]
) -> None:
    expected = reference(family)
    engines = pipeline(makers, checkpoint(family))
    assert_equal(*greedy(engines, expected.prompt, len(expected.ids), chunks=(17,)), expected)


@pytest.mark.parametrize("makers", MIXED[:2])
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_rows_of_a_ragged_batch_do_not_see_each_other(
    family: str, makers: Makers, checkpoint: Checkpoints, reference: Callable[..., Reference]
) -> None:
    expected = [reference(family, prompt_tokens) for prompt_tokens in (5, 40)]
    found = ragged(pipeline(makers, checkpoint(family)), [answer.prompt for answer in expected], LAST_TOKENS)
    for (ids, logits), answer in zip(found, expected, strict=True):
        assert_equal(ids, logits, answer)


@pytest.mark.parametrize("makers", MIXED)
@pytest.mark.parametrize("family", STATE_FAMILIES)
def test_states_stay_on_the_stage_that_keeps_them(
    family: str, makers: Makers, checkpoint: Checkpoints, reference: Callable[..., Reference]
) -> None:
    """Not from five tokens: transformers' own float32 is then 4e-4 away from float64, and MLX's 2e-4."""
    expected = [reference(family, prompt_tokens) for prompt_tokens in (11, 40)]
    found = ragged(pipeline(makers, checkpoint(family)), [answer.prompt for answer in expected], LAST_TOKENS)
    for (ids, logits), answer in zip(found, expected, strict=True):
        assert_equal(ids, logits, answer)


@pytest.mark.parametrize("makers", MIXED[:2])
def test_experts_in_stacks_mean_the_same_as_experts_alone(
    makers: Makers, checkpoint: Checkpoints, reference: Callable[..., Reference]
) -> None:
    expected = reference("qwen3_5_moe")
    engines = pipeline(makers, experts_in_stacks(checkpoint("qwen3_5_moe")))
    assert_equal(*greedy(engines, expected.prompt, 4), expected)


@pytest.mark.parametrize("what", ["windows everywhere", "short factors"])
def test_settings_that_mlx_lm_ignores_mean_the_same_to_both_engines(what: str, tmp_path: Path) -> None:
    family, overrides = BEYOND_MLX_LM[what]
    folder = make_checkpoint(family, tmp_path, **overrides)
    expected = decisive_reference(WholeModel(folder), prompt_tokens=40, count=LAST_TOKENS, tolerance=TOLERANCE)
    for makers in (TORCH_MLX, MLX_TORCH):
        engines = load_pipeline(makers, stage_specs(folder, (3,), context_tokens=128))
        assert_equal(*greedy(engines, expected.prompt, LAST_TOKENS, chunks=(9,)), expected)


@pytest.mark.parametrize("makers", MIXED[:2])
def test_silence_on_how_much_of_a_head_is_rotated_means_the_same_to_all(
    makers: Makers, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """GLM-4 rotates half of it then."""
    rotation = {"rope_type": "default", "rope_theta": 50_000.0}
    folder = copied(checkpoint("glm4"), tmp_path, rope_parameters=rotation)
    prompt = random_prompt(40, seed=3)
    found = run_prefill(pipeline(makers, folder), prompt)
    np.testing.assert_allclose(found, WholeModel(folder).logits(prompt)[-1], rtol=0, atol=TOLERANCE)


def test_stages_on_the_wrong_side_of_a_cut_fail_the_check(
    checkpoint: Checkpoints, reference: Callable[..., Reference]
) -> None:
    """Latents, sinks and windows stay within a stage, so every boundary looks alike; only the answer can tell."""
    expected = reference("gpt_oss")
    first, _, last = stage_specs(checkpoint("gpt_oss"), (2, 4))
    engines = load_pipeline((TorchEngine, MlxEngine), (first, last))
    with pytest.raises(AssertionError):
        assert_equal(*greedy(engines, expected.prompt, len(expected.ids)), expected)
