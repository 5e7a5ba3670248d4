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


@pytest.mark.parametrize("makers", [(TorchEngine, MlxEngine, TorchEngine), (MlxEngine, TorchEngine, MlxEngine)])
@pytest.mark.parametrize("layout", ["awq", "gptq_act_order", "compressed_asymmetric"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_same_file_runs_on_both_engines_together(
    family: str, layout: str, makers: tuple[type, ...], integers: Callable[[str, str], tuple[Path, Reference]]
) -> None:
    packed, expected = integers(family, layout)
    engines = load_pipeline(makers, stage_specs(packed, (1, 2)))
    assert_same(*greedy(engines, expected.prompt, len(expected.ids)), expected, tolerance=TOLERANCE)
