"""Every family in MLX's four bits, on one to three stages of either engine and of both: the same folder, and what
transformers computes with the same numbers unpacked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the checkpoints are made by mlx-lm")

from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from tests.checkpoints import FAMILIES, MORE_FAMILIES, STATE_FAMILIES
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, load_pipeline, stage_specs
from tests.oracle.reference import Reference, assert_same

Makers = tuple[Callable[[], Engine], ...]

CUTS: dict[int, tuple[int, ...]] = {1: (), 2: (3,), 3: (2, 4)}

NAMES = {"torch": TorchEngine, "mlx": MlxEngine}

PIPELINES = (
    "torch",
    "torch torch",
    "torch torch torch",
    "mlx",
    "mlx mlx",
    "mlx mlx mlx",
    "torch mlx",
    "mlx torch",
    "torch mlx torch",
    "mlx torch mlx",
)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *STATE_FAMILIES])
def test_a_packed_checkpoint_equals_transformers_on_the_unpacked_weights(
    family: str, pipeline: str, converted: Callable[..., tuple[Path, Path]], unpacked_answer: Callable[..., Reference]
) -> None:
    expected = unpacked_answer(family)
    makers: Makers = tuple(NAMES[name] for name in pipeline.split())
    engines = load_pipeline(makers, stage_specs(converted(family)[0], CUTS[len(makers)]))
    assert_same(*greedy(engines, expected.prompt, len(expected.ids), chunks=(17,)), expected, tolerance=TOLERANCE)
