"""docs/models.md says what passing tests showed, and nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cluster.models.families import known_families
from cluster.models.family import Family
from cluster.types import Backend

ROOT = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_page", ROOT / "deploy" / "models_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = _load()

ALL_SHOWN: list[dict[str, Any]] = json.loads((ROOT / "docs" / "models.json").read_text())


def shown(family: str, *engines: str, tolerance: float = 5e-4, **fields: str) -> dict[str, object]:
    entry = {"family": family, "format": "full precision", "dtype": "float32", "judge": "transformers", **fields}
    return {**entry, "engines": list(engines), "tolerance": tolerance}


def rows(*entries: dict[str, object]) -> list[list[str]]:
    """The cells of the table's rows."""
    lines = page.render(entries, known_families()).partition("|---|---|---|---|---|\n")[2].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_cell_tells_stages_tolerance_and_judge() -> None:
    cells = rows(shown("llama", "torch"), shown("llama", "torch", "torch"), shown("llama", "mlx", "torch", "mlx"))[0]
    assert cells == [
        "Llama (`llama`)",
        "full precision",
        "1–2 stages; 0.0005 transformers",
        "–",
        "3 stages; 0.0005 transformers",
    ]


def test_every_family_has_a_row_and_what_nobody_showed_is_a_dash_or_a_refusal() -> None:
    found = {cells[0]: cells[2:] for cells in rows()}
    assert len(found) == len(known_families())
    for family in known_families():
        able = [family.engines >= {Backend.TORCH}, family.engines >= {Backend.MLX}, len(family.engines) == 2]
        assert found[f"{family.title} (`{family.model_type}`)"] == ["–" if does else "*refused*" for does in able]


def test_packed_formats_and_narrower_types_follow_in_rows_of_their_own() -> None:
    entries = [shown("llama", "mlx", format="AWQ"), shown("llama", "mlx"), shown("llama", "mlx", dtype="bfloat16")]
    assert [cells[1] for cells in rows(*entries)[:3]] == ["full precision", "full precision, in bfloat16", "AWQ"]


def test_in_16_bits_a_tolerance_is_a_multiple_of_the_judges_rounding() -> None:
    cells = rows(shown("llama", "torch", dtype="bfloat16", tolerance=2.0))[0]
    assert cells[1:3] == ["full precision, in bfloat16", "1 stage; 2 × transformers"]


def test_the_page_follows_from_what_was_shown() -> None:
    assert (ROOT / "docs" / "models.md").read_text() == page.render(ALL_SHOWN, known_families()), "run `make docs`"


@pytest.mark.parametrize("family", known_families(), ids=lambda family: family.model_type)
def test_every_family_is_shown_in_full_precision_on_each_of_its_engines_and_mixed(family: Family) -> None:
    """Where it fails: CONTRIBUTING.md says how to add what a new family's tests show."""
    kinds = {
        frozenset(entry["engines"])
        for entry in ALL_SHOWN
        if entry["family"] == family.model_type and entry["format"] == page.FULL_PRECISION
    }
    alone = {frozenset({engine.value}) for engine in family.engines}
    assert kinds >= alone | {frozenset(engine.value for engine in family.engines)}


@pytest.mark.parametrize(
    "method", ["MLX affine", "MLX mxfp4", "AWQ", "GPTQ", "FP8", "compressed-tensors", "mxfp4 as", "GGUF", "4-bit, made"]
)
def test_every_kind_of_format_is_shown_on_both_engines_and_mixed(method: str) -> None:
    kinds = {frozenset(entry["engines"]) for entry in ALL_SHOWN if entry["format"].startswith(method)}
    assert kinds >= {frozenset({"torch"}), frozenset({"mlx"}), frozenset({"torch", "mlx"})}
