"""AWQ, GPTQ and compressed-tensors: settings that Potluck computes exactly are read, all others refused by name; and
stored tensors that do not fit them are refused before anything is allocated."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ModelError
from cluster.models.checkpoint import StoredTensor
from cluster.models.formats import Packing, Quantization, read_quantization
from cluster.models.matrices import Matrix, read_matrices
from cluster.types import DType

PATH = "model.layers.0.mlp.up_proj"
I32, F16, BF16, F32 = DType.I32, DType.F16, DType.BF16, DType.F32

Stored = dict[str, tuple[DType, tuple[int, ...]]]

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": True}
WEIGHTS = {"num_bits": 4, "group_size": 64, "strategy": "group", "symmetric": True, "type": "int"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": WEIGHTS, "targets": ["Linear"], "input_activations": None}},
}

AWQ_FILES: Stored = {"qweight": (I32, (128, 12)), "qzeros": (I32, (2, 12)), "scales": (F16, (2, 96))}
GPTQ_FILES: Stored = {
    "qweight": (I32, (16, 96)),
    "qzeros": (I32, (2, 12)),
    "scales": (F16, (2, 96)),
    "g_idx": (I32, (128,)),
}
COMPRESSED_FILES: Stored = {
    "weight_packed": (I32, (96, 16)),
    "weight_scale": (F16, (96, 2)),
    "weight_shape": (DType.I64, (2,)),
}
ASYMMETRIC_FILES = COMPRESSED_FILES | {"weight_zero_point": (I32, (12, 2))}


def stated(settings: object) -> Quantization:
    found = read_quantization({"quantization_config": settings}, "here")
    assert found is not None
    return found


def compressed(**weights: object) -> dict[str, Any]:
    return COMPRESSED | {"config_groups": {"group_0": {"weights": WEIGHTS | weights}}}


def matrix_of(files: Stored, settings: object) -> Matrix:
    tensors = []
    for name, (dtype, shape) in files.items():
        size = dtype.size_bytes
        for extent in shape:
            size *= extent
        tensors.append(StoredTensor(f"{PATH}.{name}", dtype, shape, "model.safetensors", 0, size))
    (matrix,) = read_matrices(tensors, stated(settings), "here").values()
    return matrix


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (AWQ, Quantization(Packing.AWQ, 4, 64)),
        ({"quant_method": "awq", "bits": 4}, Quantization(Packing.AWQ, 4, 128)),
        (GPTQ, Quantization(Packing.GPTQ, 4, 64, zeros_are_one_less=True, reordered=True)),
        (GPTQ | {"checkpoint_format": "gptq_v2", "bits": 8, "desc_act": False}, Quantization(Packing.GPTQ, 8, 64)),
        (
            GPTQ | {"sym": True, "group_size": -1, "desc_act": False},
            Quantization(Packing.GPTQ, 4, 0, symmetric=True, zeros_are_one_less=True),
        ),
        (COMPRESSED, Quantization(Packing.INTEGERS, 4, 64, symmetric=True)),
        (compressed(num_bits=8, symmetric=False), Quantization(Packing.INTEGERS, 8, 64)),
        (compressed(actorder="group"), Quantization(Packing.INTEGERS, 4, 64, symmetric=True, reordered=True)),
        (compressed(actorder="weight"), Quantization(Packing.INTEGERS, 4, 64, symmetric=True)),
        (compressed(strategy="channel", group_size=None), Quantization(Packing.INTEGERS, 4, 0, symmetric=True)),
    ],
)
def test_settings_are_read(settings: object, expected: Quantization) -> None:
    assert stated(settings) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AWQ | {"version": "gemv"}, "AWQ with version 'gemv', .* expects version gemm"),
        (AWQ | {"zero_point": False}, "AWQ with zero_point False"),
        (AWQ | {"bits": 8}, "AWQ with bits 8"),
        (AWQ | {"group_size": 0}, "expected group_size -1 or from 1"),
        (AWQ | {"group_size": 1 << 40}, "expected group_size -1 or from 1"),
        (GPTQ | {"bits": 3}, "GPTQ with bits 3"),
        (GPTQ | {"bits": True}, "GPTQ with bits True"),
        (GPTQ | {"checkpoint_format": "marlin"}, "GPTQ with checkpoint_format 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "GPTQ in Marlin's layout"),
        (compressed(type="float"), "pack-quantized weights of type 'float'"),
        (compressed(strategy="tensor"), "strategy 'tensor'"),
        (compressed(num_bits=2), "num_bits 2"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "with a kv_cache_scheme"),
        (COMPRESSED | {"transform_config": {"u": 1}}, "with a transform_config"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "with a sparsity_config"),
        (COMPRESSED | {"config_groups": {}}, "expected config_groups"),
        (COMPRESSED | {"config_groups": {"a": 3}}, "expected weights in each of config_groups"),
        (
            COMPRESSED | {"config_groups": {"a": {"weights": WEIGHTS, "input_activations": {"num_bits": 8}}}},
            "with input_activations, .* expects weights alone to be quantised",
        ),
        (
            COMPRESSED | {"config_groups": {"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS | {"num_bits": 8}}}},
            "config_groups that differ",
        ),
        (COMPRESSED | {"format": "int-quantized"}, "'compressed-tensors int-quantized', which Potluck does not read"),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    ],
)
def test_settings_that_mean_something_else_are_refused_by_name(settings: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        stated(settings)


@pytest.mark.parametrize(
    ("files", "settings"),
    [
        (AWQ_FILES, AWQ),
        (GPTQ_FILES, GPTQ),
        (COMPRESSED_FILES, COMPRESSED),
        (ASYMMETRIC_FILES, compressed(symmetric=False)),
    ],
)
def test_matrices_have_the_shape_that_their_words_hold(files: Stored, settings: object) -> None:
    assert matrix_of(files, settings).shape == (96, 128)


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        (AWQ_FILES | {"qweight": (I32, (96, 12))}, AWQ, "whole groups of 64 columns"),
        (AWQ_FILES | {"qweight": (DType.U32, (128, 12))}, AWQ, "expected a matrix of I32"),
        (AWQ_FILES | {"qweight": (I32, (128, 12, 1))}, AWQ, "expected a matrix of I32"),
        (AWQ_FILES | {"scales": (F16, (96, 2))}, AWQ, "scales for 96 rows of 2 groups"),
        (AWQ_FILES | {"scales": (DType.U8, (2, 96))}, AWQ, "scales for 96 rows of 2 groups"),
        (AWQ_FILES | {"qzeros": (I32, (2, 96))}, AWQ, "packed zeros"),
        (AWQ_FILES | {"qzeros": (F16, (2, 12))}, AWQ, "packed zeros"),
        ({k: v for k, v in AWQ_FILES.items() if k != "qzeros"}, AWQ, "no zeros beside it"),
        (GPTQ_FILES | {"g_idx": (I32, (127,))}, GPTQ, "the group .* of each of 128 columns"),
        (GPTQ_FILES | {"g_idx": (F32, (128,))}, GPTQ, "the group .* of each of 128 columns"),
        (
            GPTQ_FILES | {"qweight": (I32, (16, 97)), "scales": (F16, (2, 97))},
            GPTQ,
            "whole groups of 64 columns and whole words",
        ),
        (COMPRESSED_FILES, compressed(symmetric=False), "no zeros beside it"),
        (AWQ_FILES, COMPRESSED, "states pack-quantized, but there is"),
        (COMPRESSED_FILES, AWQ, "states awq, but there is"),
    ],
)
def test_tensors_that_do_not_fit_the_settings_are_refused(files: Stored, settings: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        matrix_of(files, settings)


@given(
    st.sampled_from([AWQ, GPTQ, COMPRESSED, compressed(symmetric=False), compressed(strategy="channel")]),
    st.fixed_dictionaries(
        {name: st.none() | st.tuples(st.sampled_from([I32, F16]), st.lists(st.integers(0, 99), max_size=3).map(tuple))
         for name in (*GPTQ_FILES, *ASYMMETRIC_FILES)}
    ),
)  # fmt: skip
def test_any_shapes_make_a_matrix_as_large_as_its_words_or_are_refused(settings: object, changed: Any) -> None:
    files = {name: found for name, found in changed.items() if found is not None}
    base = {"awq": AWQ_FILES, "gptq": GPTQ_FILES}.get(stated(settings).kind, ASYMMETRIC_FILES)
    try:
        matrix = matrix_of(base | {name: found for name, found in files.items() if name in base}, settings)
    except ModelError:
        return
    rows, columns = matrix.shape
    assert rows * columns == 8 * matrix.values.size_bytes // 4
