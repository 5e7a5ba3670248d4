"""Matrices of integers in shared steps: neighbours change nothing, neither greedy answers nor seeded ones. The other
formats are asked the same where their checkpoints are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra [torch]")
pytest.importorskip("mlx_lm", reason="needs the extra [mlx]")

from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from tests.integer_checkpoints import LAYOUTS
from tests.oracle.company import assert_company_changes_nothing
from tests.oracle.reference import Reference


@pytest.mark.parametrize("makers", [(TorchEngine,), (MlxEngine,), (TorchEngine, MlxEngine)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_in_a_ragged_batch_are_those_without_neighbours(
    layout: str, makers: tuple[type, ...], integers: Callable[[str, str], tuple[Path, Reference]]
) -> None:
    assert_company_changes_nothing(makers, *integers("llama", layout))
