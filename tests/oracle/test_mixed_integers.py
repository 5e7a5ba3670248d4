"""AWQ, GPTQ and compressed-tensors checkpoints on torch and MLX together: the same file, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, load_pipeline, stage_specs
from tests.oracle.reference import Reference, assert_same

Makers = tuple[type, ...]

T, M = TorchEngine, MlxEngine
BETWEEN: tuple[Makers, ...] = ((T, M, T), (M, T, M))


def assert_equal_pipeline(made: tuple[Path, Reference], makers: Makers) -> None:
    packed, expected = made
    engines = load_pipeline(makers, stage_specs(packed, {1: (), 2: (2,), 3: (1, 2)}[len(makers)]))
    assert_same(*greedy(engines, expected.prompt, len(expected.ids)), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("makers", BETWEEN)
@pytest.mark.parametrize("layout", ["awq", "gptq_act_order", "compressed_asymmetric"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_same_file_runs_on_both_engines_together(
    family: str, layout: str, makers: Makers, integers: Callable[[str, str], tuple[Path, Reference]]
) -> None:
    assert_equal_pipeline(integers(family, layout), makers)


@pytest.mark.parametrize("makers", [(T, M), *BETWEEN])
@pytest.mark.parametrize("family", ["gemma3", "phi3", "deepseek_v3", "qwen3_next"])
def test_other_families_run_on_both_engines_together(
    family: str, makers: Makers, integers: Callable[[str, str], tuple[Path, Reference]]
) -> None:
    assert_equal_pipeline(integers(family, "awq"), makers)


@pytest.mark.parametrize("makers", [(T,), (T, T, T), (M,), (M, M, M), (T, M), *BETWEEN])
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, "awq") for family in ("qwen2", "qwen3", "mistral")),
        *((family, "gptq") for family in ("qwen2", "qwen3", "gemma3", "deepseek_v3")),
        *((family, "compressed") for family in ("qwen3", "mistral", "gemma3")),
    ],
)
def test_what_people_publish_in_four_bits_runs_everywhere(
    family: str, layout: str, makers: Makers, integers: Callable[[str, str], tuple[Path, Reference]]
) -> None:
    assert_equal_pipeline(integers(family, layout), makers)
