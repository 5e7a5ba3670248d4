"""What counts as shown: a whole pipeline, a decisive continuation, a comparison that held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.types import Backend, DType, LayerRange, TensorSpec
from node.engine import StageSpec
from tests.oracle import ledger
from tests.oracle.reference import LAST_TOKENS, Reference, assert_same


class StageEngine:
    """All that the ledger wants to know of an engine."""

    def __init__(self, backend: Backend = Backend.MLX) -> None:
        self.backend = backend


def pipeline(folder: Path, *ranges: tuple[int, int]) -> list[Any]:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    engines = [StageEngine() for _ in ranges]
    boundary = (TensorSpec("hidden", (4,), DType.F32),)
    for engine, (first, last) in zip(engines, ranges, strict=True):
        spec = StageSpec(folder, LayerRange(first, last), 4, boundary, "cpu", 1, 64, 64)
        ledger.loaded(engine, spec)  # type: ignore[arg-type]
    return engines


IDS = list(range(LAST_TOKENS))
LOGITS = np.zeros((LAST_TOKENS, 3), np.float32)
REFERENCE = Reference([1], IDS, LOGITS, "mlx-lm")


def test_a_comparison_that_holds_is_entered_for_the_pipeline_that_ran(tmp_path: Path) -> None:
    ledger.take()
    ledger.ran(pipeline(tmp_path, (0, 1), (1, 4)))
    assert_same(IDS, LOGITS + 1e-5, REFERENCE, tolerance=1e-4)
    assert ledger.take() == {ledger.Shown("qwen2", "full precision", "float32", ("mlx", "mlx"), "mlx-lm", 1e-4)}


def test_a_comparison_that_fails_or_is_too_short_or_of_a_part_is_not_entered(tmp_path: Path) -> None:
    ledger.take()
    ledger.ran(pipeline(tmp_path, (0, 4)))
    with pytest.raises(AssertionError):
        assert_same(IDS, LOGITS + 1, REFERENCE, tolerance=1e-4)
    assert_same(IDS[1:], LOGITS[1:], Reference([1], IDS[1:], LOGITS[1:]), tolerance=1e-4)
    ledger.ran(pipeline(tmp_path, (0, 1), (2, 4)))
    assert_same(IDS, LOGITS, REFERENCE, tolerance=1e-4)
    assert ledger.take() == set()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "full precision"),
        ({"quantization": {"bits": 6, "group_size": 64}}, "MLX affine 6-bit, groups of 64"),
        ({"quantization_config": {"quant_method": "gptq"}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
         "compressed-tensors pack-quantized"),
    ],
)  # fmt: skip
def test_a_format_is_called_as_people_call_it(config: dict[str, object], name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ledger._format(tmp_path) == name


def test_a_checkpoint_made_of_something_else_is_called_after_that(tmp_path: Path) -> None:
    ledger.name_format(tmp_path, "GGUF Q4_0")
    assert ledger._format(tmp_path) == "GGUF Q4_0"
