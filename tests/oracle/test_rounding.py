"""In 16 bits, as people run models: every family, alone and on both engines together, is as near to float32 as
transformers in 16 bits is, layer by layer; and what is a little wrong is seen.

Unpacked experts run on torch alone here: MLX has no kernel for them in 16 bits on a processor.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import torch
from safetensors.torch import load_file, save_file

from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.mlx.positions import UnownedCache
from node.engines.torch.engine import TorchEngine
from node.engines.torch.slicing import SlicedModel
from tests.checkpoints import FAMILIES, MORE_FAMILIES, STATE_FAMILIES, make_checkpoint
from tests.converted import convert, unconverted
from tests.integer_checkpoints import quantised_checkpoint
from tests.oracle import ledger
from tests.oracle.dequantised import dequantised
from tests.oracle.pipelines import load_pipeline, stage_specs
from tests.oracle.rounding import Judge, follow, judge_of, parts_alone
from tests.oracle.test_bits import FAMILIES as PACKED_AT_LOAD
from tests.oracle.test_bits import MORE as MORE_PACKED_AT_LOAD

Maker = Callable[[], Engine]

EXPERTS = ("qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4", "llama4", "qwen3_next", "qwen3_5_moe")
ALL = (*FAMILIES, *MORE_FAMILIES, *STATE_FAMILIES)
WHOLE_GROUPS = PACKED_AT_LOAD | MORE_PACKED_AT_LOAD
CUTS: dict[int, tuple[int, ...]] = {1: (), 2: (3,), 3: (2, 4)}
T, M = TorchEngine, MlxEngine
ALONE: tuple[tuple[Maker, ...], ...] = ((T,), (M,))
MIXED: tuple[tuple[Maker, ...], ...] = ((T, M), (M, T), (T, M, T), (M, T, M))
SOME_MIXED = MIXED[1:3]

ROUNDINGS_MAX = 2.0
"""How many times as far from float32 as transformers a layer may be, and all of them without experts. Right ones were
0.9 to 1.5 times as far; one norm a tenth too large gave 16 and more, one position too many 15 and more."""

PACKED_ROUNDINGS_MAX = 4.0
"""The same where MLX computes packed matrices: on a CPU it sums their products in 16 bits. Right ones were 2.2 to 3.1
times as far."""

WIDTH_MAX = 0.6
"""How far logits of a pipeline with experts may be from float32, in terms of their width: a token that goes elsewhere
in one layer does so in the next as well, so layers tell more of these. Right ones were 0.02 to 0.4, and a pipeline that
skips a stage 0.85 and more."""

DECISIVE_MIN = 4


@dataclass(frozen=True, slots=True)
class Case:
    family: str
    format: str = "full"  # or `mlx` and how many bits, `bits` (packed at load), or a layout of integers
    dtype: str = "bfloat16"

    @property
    def routed(self) -> bool:
        return self.family in EXPERTS

    @property
    def bits(self) -> int | None:
        return 4 if self.format == "bits" else None

    def limit(self, makers: tuple[Maker, ...]) -> float:
        return PACKED_ROUNDINGS_MAX if self.format != "full" and M in makers else ROUNDINGS_MAX


Folders = Callable[[Case], tuple[Path, Path]]
Judges = Callable[[Case], Judge]
Errors = Callable[[Case, Maker], list[float]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The checkpoint of a case, and its numbers as transformers stores them."""

    @cache
    def make(case: Case) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(case.family)
        sizes = WHOLE_GROUPS[case.family] if case.format == "bits" else {}
        plain = make_checkpoint(case.family, root / "plain", dtype=case.dtype, **sizes)  # type: ignore[arg-type]
        if case.format == "full":
            return plain, plain
        if case.bits is not None:
            return plain, dequantised(plain, root / "rounded", case.bits)
        if not case.format.startswith("mlx"):
            return quantised_checkpoint(plain, case.format)
        packed = convert(plain, root / "packed", bits=int(case.format.removeprefix("mlx")))
        return packed, unconverted(packed, root / "unpacked")

    return make


@pytest.fixture(scope="module")
def judge(folders: Folders) -> Judges:
    @cache
    def make(case: Case) -> Judge:
        has_text = case.format == "full" and not case.routed
        dtype = getattr(torch, case.dtype)
        return judge_of(*folders(case), dtype, decisive_min=DECISIVE_MIN if has_text else 0)

    return make


@pytest.fixture(scope="module")
def errors(folders: Folders, judge: Judges) -> Errors:
    """Of each part alone on one engine."""

    @cache
    def make(case: Case, maker: Maker) -> list[float]:
        return judge(case).errors(parts_alone(folders(case)[0], maker, judge(case), bits=case.bits))

    return make


def assert_near_float32(case: Case, makers: tuple[Maker, ...], folder: Path, judge: Judge, errors: Errors) -> None:
    """The check that mutants have to fail."""
    limit = case.limit(makers)
    for maker in makers:
        assert all(error <= limit for error in errors(case, maker))  # false where one is no number
    logits = follow(load_pipeline(makers, stage_specs(folder, CUTS[len(makers)], bits=case.bits)), judge)
    if case.routed:
        assert judge.distance(logits) <= WIDTH_MAX
    else:
        assert judge.error_of_logits(logits) <= limit
    if case.format == "full" and not case.routed:
        assert (logits.argmax(-1) == judge.logits.argmax(-1))[judge.decisive].all()
    ledger.equalled("transformers", limit)


CASES = [
    *((Case(family), makers) for family in ALL if family not in EXPERTS for makers in (*ALONE, *MIXED)),
    *((Case(family), (T,)) for family in EXPERTS),
    *((Case(family, "mlx4"), makers) for family in ALL for makers in (*ALONE, *SOME_MIXED)),
    *((Case("llama", width), makers) for width in ("mlx3", "mlx6", "mlx8") for makers in (*ALONE, *SOME_MIXED)),
    *((Case(family, "bits"), makers) for family in ("llama", *EXPERTS) for makers in (*ALONE, *SOME_MIXED)),
    *((Case(family, "awq", "float16"), makers) for family in ("llama", "qwen3_moe") for makers in (*ALONE, *MIXED)),
    *((Case("llama", dtype="float16"), makers) for makers in (*ALONE, *MIXED)),
]


def _name(value: object) -> str:
    if isinstance(value, Case):
        return f"{value.family}-{value.format}-{value.dtype}"
    return "-".join("mlx" if maker is M else "torch" for maker in value)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("case", "makers"), CASES, ids=_name)
def test_layers_and_pipelines_are_as_near_to_float32_as_the_library(
    case: Case, makers: tuple[Maker, ...], folders: Folders, judge: Judges, errors: Errors
) -> None:
    assert_near_float32(case, makers, folders(case)[0], judge(case), errors)


SEEN = pytest.mark.parametrize(
    ("case", "maker"),
    [(Case("llama"), T), (Case("llama"), M), (Case("qwen3_moe", "mlx4"), T), (Case("qwen3_moe", "mlx4"), M)],
    ids=lambda value: _name(value if isinstance(value, Case) else (value,)),
)


@SEEN
def test_one_norm_that_is_a_tenth_too_large_is_seen_in_its_layer_alone(
    case: Case, maker: Maker, folders: Folders, judge: Judges, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders(case)[0], tmp_path / "wrong"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.3.post_attention_layernorm.weight"
    tensors[name] = tensors[name] * 1.1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = judge(case).errors(parts_alone(folder, maker, judge(case)))
    assert [layer for layer, error in enumerate(found) if error > case.limit((maker,))] == [3]


@SEEN
def test_a_position_that_is_off_by_one_while_an_answer_is_said_is_seen_in_every_layer(
    case: Case, maker: Maker, folders: Folders, judge: Judges, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rotations alone: what is attended to stays right."""
    arguments = SlicedModel._arguments

    def one_too_far(model: SlicedModel, entering: Any, positions: torch.Tensor, batch: Any) -> dict[str, object]:
        return arguments(model, entering, positions + (len(positions) == 1), batch)

    monkeypatch.setattr(SlicedModel, "_arguments", one_too_far)
    monkeypatch.setattr(
        UnownedCache,
        "offset",
        property(lambda cache: cache._positions.offset + (cache._positions.tokens == 1)),
    )
    found = judge(case).errors(parts_alone(folders(case)[0], maker, judge(case)))
    assert min(found) > case.limit((maker,))


@pytest.mark.parametrize("case", [Case("llama"), Case("qwen3_moe", "mlx4")], ids=_name)
def test_a_pipeline_that_skips_a_stage_fails_the_check(case: Case, folders: Folders, judge: Judges) -> None:
    first, _, last = stage_specs(folders(case)[0], (2, 4))
    logits = follow(load_pipeline((T, M), (first, last)), judge(case))
    assert judge(case).error_of_logits(logits) > case.limit((T, M))
    assert judge(case).distance(logits) > WIDTH_MAX
