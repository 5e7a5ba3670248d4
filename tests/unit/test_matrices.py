"""Stored tensors make the matrices that they belong to, in every format; what does not fit together is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ModelError
from cluster.models.checkpoint import StoredTensor
from cluster.models.formats import Packing, Width, read_quantization
from cluster.models.matrices import Matrix, Role, read_matrices
from cluster.types import DType

PATH = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
F32, BF16, U32, U8, I32, F8 = DType.F32, DType.BF16, DType.U32, DType.U8, DType.I32, DType.F8_E4M3

Stored = dict[str, tuple[DType, tuple[int, ...]]]


def tensors_of(stored: Stored) -> list[StoredTensor]:
    found, end = [], 0
    for name, (dtype, shape) in stored.items():
        begin = end
        for extent in (end := dtype.size_bytes, *shape)[1:]:
            end *= extent
        end += begin
        found.append(StoredTensor(name, dtype, shape, "model.safetensors", begin, end))
    return found


def matrices_of(stored: Stored, config: dict[str, Any]) -> dict[str, Matrix]:
    return read_matrices(tensors_of(stored), read_quantization(config, "here"), "here")


def mlx(bits: int, group: int, **others: object) -> dict[str, Any]:
    return {"quantization": {"bits": bits, "group_size": group, **others}}


def method(name: str, **others: object) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **others}}


CODES_4 = {f"{PATH}.weight": (U32, (64, 16)), f"{PATH}.scales": (BF16, (64, 2))}
AFFINE_4 = {**CODES_4, f"{PATH}.biases": (BF16, (64, 2))}
COMPRESSED = {
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "strategy": "group"}}},
}
ROWS_8 = {
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "channel"}}},
}


def eight_bits(**weights: object) -> dict[str, Any]:
    return {**ROWS_8, "config_groups": {"group_0": {"weights": {"num_bits": 8, **weights}}}}


@pytest.mark.parametrize(
    ("stored", "config", "packing", "width", "shape"),
    [
        (AFFINE_4, mlx(4, 64), Packing.AFFINE, Width(4, 64), (64, 128)),
        (
            {k: (d, (8, *s)) for k, (d, s) in AFFINE_4.items()},
            mlx(4, 64),
            Packing.AFFINE,
            Width(4, 64),
            (8, 64, 128),
        ),
        (
            {f"{PATH}.weight": (U32, (64, 16)), f"{PATH}.scales": (U8, (64, 4))},
            mlx(4, 32, mode="mxfp4"),
            Packing.MXFP4,
            Width(4, 32),
            (64, 128),
        ),
        (
            {f"{PATH}.weight": (F8, (64, 200)), f"{PATH}.weight_scale_inv": (F32, (1, 2))},
            method("fp8", weight_block_size=[128, 128]),
            Packing.FP8,
            Width(8, 0),
            (64, 200),
        ),
        (
            {f"{PATH}.weight": (F8, (64, 200)), f"{PATH}.weight_scale": (BF16, (64, 1))},
            method("compressed-tensors", **ROWS_8),
            Packing.FP8,
            Width(8, 0),
            (64, 200),
        ),
        (
            {
                f"{PATH}.qweight": (I32, (128, 8)),
                f"{PATH}.qzeros": (I32, (2, 8)),
                f"{PATH}.scales": (BF16, (2, 64)),
            },
            method("awq", bits=4, group_size=64),
            Packing.AWQ,
            Width(4, 64),
            (64, 128),
        ),
        (
            {
                f"{PATH}.qweight": (I32, (16, 64)),
                f"{PATH}.qzeros": (I32, (1, 8)),
                f"{PATH}.scales": (BF16, (1, 64)),
                f"{PATH}.g_idx": (I32, (128,)),
            },
            method("gptq", bits=4, group_size=-1),
            Packing.GPTQ,
            Width(4, 0),
            (64, 128),
        ),
        (
            {
                f"{PATH}.weight_packed": (I32, (64, 16)),
                f"{PATH}.weight_scale": (BF16, (64, 4)),
                f"{PATH}.weight_shape": (I32, (2,)),
            },
            method("compressed-tensors", **COMPRESSED),
            Packing.INTEGERS,
            Width(4, 32),
            (64, 128),
        ),
    ],
)
def test_a_packed_matrix_is_known_by_its_logical_name_and_shape(
    stored: Stored, config: dict[str, Any], packing: Packing, width: Width, shape: tuple[int, ...]
) -> None:
    (matrix,) = matrices_of(stored, config).values()
    assert (matrix.name, matrix.packing, matrix.width) == (f"{PATH}.weight", packing, width)
    assert (matrix.shape, len(matrix.tensors)) == (shape, len(stored))


def test_gpt_oss_as_published_keeps_four_bits_in_blocks() -> None:
    stored = {f"{EXPERTS}_blocks": (U8, (8, 256, 4, 16)), f"{EXPERTS}_scales": (U8, (8, 256, 4))}
    found = matrices_of({**stored, f"{EXPERTS}_bias": (BF16, (8, 256))}, method("mxfp4"))
    assert found.keys() == {EXPERTS, f"{EXPERTS}_bias"}
    assert (found[EXPERTS].packing, found[EXPERTS].shape) == (Packing.MXFP4, (8, 256, 128))
    assert found[f"{EXPERTS}_bias"].packing is Packing.NONE


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (mlx(4, 32), Width(8, 32)),  # a recipe that gives some matrices more bits
        (mlx(2, 64), Width(4, 64)),
        (mlx(4, 32, **{PATH: {"bits": 2, "group_size": 128}}), Width(2, 128)),
        (mlx(4, 32, mode="mxfp4", **{PATH: {"bits": 4, "group_size": 64}}), Width(4, 64)),
    ],
)
def test_a_matrix_may_be_packed_unlike_the_others(config: dict[str, Any], width: Width) -> None:
    (matrix,) = matrices_of(AFFINE_4, config).values()
    assert matrix.width == width
    assert matrix.shape == (64, 16 * 32 // width.bits)


def test_an_override_of_a_wrapped_model_is_found_by_its_canonical_name() -> None:
    stated = read_quantization(mlx(4, 64, **{f"language_model.{PATH}": {"bits": 8, "group_size": 32}}), "here")
    assert stated is not None
    assert stated.overrides == {f"{PATH}.weight": Width(8, 32)}


@pytest.mark.parametrize(
    ("stored", "config", "message"),
    [
        (AFFINE_4, {}, "is packed, but config.json states no quantization"),
        (
            AFFINE_4 | {f"{PATH}.scales": (BF16, (64, 3))},
            mlx(4, 64),
            r"shape \[64, 16\], its scales \[64, 3\], which do not fit",
        ),
        (AFFINE_4 | {f"{PATH}.scales": (BF16, (32, 2))}, mlx(4, 64), "do not fit together"),
        (AFFINE_4 | {f"{PATH}.weight": (U32, (64, 0))}, mlx(4, 64), "expected codes of a matrix"),
        (AFFINE_4, mlx(5, 48), "states 5 bits and groups of 48"),
        (CODES_4, mlx(4, 64), "packed in a way that Potluck does not know"),
        ({f"{PATH}.weight": (F8, (64, 64))}, method("fp8"), "its scales are missing"),
        (
            {f"{PATH}.qweight": (I32, (64, 8)), f"{PATH}.scales": (BF16, (1, 64))},
            method("fp8"),
            "weights packed as fp8",
        ),
        (
            {f"{EXPERTS}_blocks": (U8, (8, 256, 4, 8)), f"{EXPERTS}_scales": (U8, (8, 256, 4))},
            method("mxfp4"),
            "expected 16 bytes for each scale",
        ),
        (
            AFFINE_4 | {f"{PATH}.weight_packed": (I32, (64, 16)), f"{PATH}.weight_scale": (BF16, (64, 4))},
            method("compressed-tensors", **COMPRESSED),
            "stored twice, packed in two ways",
        ),
        (
            {f"{PATH}.weight": (F8, (64, 128)), f"{PATH}.weight_scale_inv": (U8, (1, 1))},
            method("fp8", weight_block_size=[128, 128]),
            "numbers that scale",
        ),
        ({}, method("compressed-tensors", **{**ROWS_8, "kv_cache_scheme": {"num_bits": 8}}), "kv_cache_scheme"),
        ({}, method("compressed-tensors", **{**ROWS_8, "transform_config": {"a": 1}}), "transform_config"),
        ({}, method("compressed-tensors", **eight_bits(type="int")), "of type int"),
        ({}, method("compressed-tensors", **eight_bits(strategy="group")), "strategy group"),
    ],
)
def test_what_does_not_fit_together_is_refused(stored: Stored, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        matrices_of(stored, config)


def test_tensors_with_an_extension_but_no_codes_stay_alone() -> None:
    """`router.scale` and the like are weights of their own."""
    stored = {"model.layers.0.router.scales": (BF16, (8,)), f"{PATH}.weight": (BF16, (8, 8))}
    assert {matrix.packing for matrix in matrices_of(stored, mlx(4, 64)).values()} == {Packing.NONE}


def test_how_activations_were_rounded_is_read_by_nobody() -> None:
    stored = {
        f"{PATH}.weight": (F8, (64, 64)),
        f"{PATH}.weight_scale": (F32, (1,)),
        f"{PATH}.input_scale": (F32, (1,)),
    }
    (matrix,) = matrices_of(stored, method("compressed-tensors", **ROWS_8)).values()
    assert matrix.tensors[Role.INPUTS].name == f"{PATH}.input_scale"
    assert matrix.dtype is F32


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_METHODS = ("mxfp4", "fp8", "awq", "gptq", "compressed-tensors", "bitsandbytes")
_WEIGHTS = st.dictionaries(st.sampled_from(("num_bits", "group_size", "strategy", "block_structure")), _JSON)
_SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "quant_method": st.sampled_from(_METHODS) | _JSON,
        "format": st.sampled_from(("float-quantized", "pack-quantized")) | _JSON,
        "mode": st.sampled_from(("affine", "mxfp4", "nvfp4")) | _JSON,
        "bits": st.integers(-1, 9) | _JSON,
        "group_size": st.integers(-2, 1 << 70) | _JSON,
        "weight_block_size": st.lists(st.integers(-1, 200), max_size=3) | _JSON,
        PATH: st.fixed_dictionaries({"bits": st.integers(0, 9) | _JSON, "group_size": st.integers(-2, 99) | _JSON}),
        "config_groups": st.fixed_dictionaries({"g": st.fixed_dictionaries({"weights": _WEIGHTS})}) | _JSON,
    },
)
_EXTENT = st.integers(0, 200)
_ENDINGS = (
    ".weight",
    ".scales",
    ".biases",
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    "_blocks",
    "_scales",
)
_STORED = st.dictionaries(
    st.sampled_from((*_ENDINGS, "_scales")).map(lambda ending: PATH + ending),
    st.tuples(st.sampled_from(DType), st.lists(_EXTENT, max_size=4).map(tuple)),
    max_size=6,
)


@given(_STORED, _SETTINGS | _JSON)
def test_any_configuration_and_any_shapes_are_matrices_or_refused(stored: Stored, settings: object) -> None:
    try:
        found = matrices_of(stored, {"quantization_config": settings})
    except ModelError:
        return
    assert sum(len(matrix.tensors) for matrix in found.values()) == len(stored)
