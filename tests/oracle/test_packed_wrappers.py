"""Packed vision-language checkpoints, as people publish them: the text part runs on both engines and on both together,
and says what transformers says with the same numbers unpacked."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from mlx_lm.utils import load_model, quantize_model, save_model
from safetensors.torch import load_file

from cluster.models.checkpoint import open_checkpoint
from cluster.models.layout import Unused, part_of
from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.torch.engine import TorchEngine
from tests.checkpoints import make_checkpoint
from tests.converted import convert, unconverted
from tests.eight_bit_checkpoints import eight_bits
from tests.integer_checkpoints import quantised_checkpoint
from tests.oracle import ledger
from tests.oracle.conftest import TOLERANCE
from tests.oracle.mlx_reference import whole_mlx_model
from tests.oracle.pipelines import greedy, load_pipeline, stage_specs
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, assert_same, decisive_reference
from tests.wrappers import WRAPPED, wrap, wrap_packed

MLX_FOUR_BITS = "MLX affine 4-bit, groups of 32"

CASES = (
    *((wrapper, MLX_FOUR_BITS) for wrapper in WRAPPED),
    ("qwen3_vl", "FP8"),
    ("mistral3", "compressed-tensors float-quantized"),
    ("gemma3", "compressed-tensors pack-quantized"),
    ("qwen2_5_vl", "AWQ"),
)
"""Formats as they were published with these wrappers."""

Packed = Callable[[str, str], tuple[Path, Reference]]


def packed_text(form: str, plain: Path) -> tuple[Path, Path]:
    """A text model packed, and the same numbers unpacked."""
    match form:
        case "FP8":
            return eight_bits(plain, "blocks")
        case "compressed-tensors float-quantized":
            return eight_bits(plain, "rows")
        case "compressed-tensors pack-quantized":
            return quantised_checkpoint(plain, "compressed")
        case "AWQ":
            return quantised_checkpoint(plain, "awq")
        case _:
            packed = convert(plain, plain.with_name("packed"), bits=4)
            return packed, unconverted(packed, plain.with_name("unpacked"))


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """A packed checkpoint with its tower, and a continuation by the text model alone."""

    @cache
    def make(wrapper: str, form: str) -> tuple[Path, Reference]:
        root = tmp_path_factory.mktemp(wrapper)
        plain = make_checkpoint(WRAPPED[wrapper], root / "plain")
        packed, unpacked = packed_text(form, plain)
        folder = wrap_packed(wrapper, plain, packed, root / wrapper)
        ledger.name_format(folder, f"{form}, with vision ({wrapper})")
        model = WholeModel(unpacked)
        return folder, decisive_reference(model, prompt_tokens=40, count=LAST_TOKENS, tolerance=TOLERANCE)

    return make


@pytest.mark.parametrize("makers", [(TorchEngine,), (MlxEngine,), (TorchEngine, MlxEngine), (MlxEngine, TorchEngine)])
@pytest.mark.parametrize(("wrapper", "form"), CASES)
def test_the_text_part_says_what_it_says_alone(
    wrapper: str, form: str, makers: tuple[Callable[[], Engine], ...], wrapped: Packed
) -> None:
    folder, expected = wrapped(wrapper, form)
    assert any(part_of(name) == Unused() for name in open_checkpoint(folder).tensors)
    engines = load_pipeline(makers, stage_specs(folder, (3,) * (len(makers) - 1)))
    assert_same(*greedy(engines, expected.prompt, len(expected.ids), chunks=(17,)), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("wrapper", ["gemma3", "gemma4", "llama4", "mistral3", "qwen3_5"])
def test_text_is_named_as_mlx_lm_names_it(wrapper: str, wrapped: Packed, tmp_path: Path) -> None:
    plain = make_checkpoint(WRAPPED[wrapper], tmp_path / "plain")
    whole = wrap(wrapper, plain, tmp_path / "whole")
    text = json.loads((whole / "config.json").read_text())["text_config"]
    words: Any = whole_mlx_model(plain).stated
    stated = {"text_config": text | words.get("text_config", words), "vocab_size": text["vocab_size"]}
    model, _ = load_model(whole, model_config=stated)
    model, _ = quantize_model(
        model, {}, group_size=32, bits=4, quant_predicate=lambda _, module: bool(module.weight.shape[-1] % 32 == 0)
    )
    save_model(tmp_path, model)
    found = open_checkpoint(wrapped(wrapper, MLX_FOUR_BITS)[0]).tensors
    expected = load_file(tmp_path / "model.safetensors").keys()
    assert {name for name in found if part_of(name) != Unused()} == expected
