"""Matrices of AWQ, GPTQ and compressed-tensors files as MLX unpacks them, bit for bit what their definitions say."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from cluster.errors import ModelError
from node.engines.mlx import repack
from node.engines.mlx.exact import ExactLinear, ExactSwitchLinear
from node.engines.mlx.integers import confirm
from node.engines.mlx.repack import Affine, from_awq, from_gptq, from_pack_quantized
from tests import integer_formats
from tests.integer_formats import Array, Quantised

ROWS, INPUTS = 48, 512


def weights() -> npt.NDArray[np.float32]:
    """Rows whose groups have zeros all over the range, 0 and the largest among them."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(ROWS, INPUTS)) + generator.normal(size=(ROWS, 1))
    values[0], values[1] = np.abs(values[0]), -np.abs(values[1])
    return values.astype(np.float32)


def shuffled() -> npt.NDArray[np.int64]:
    return np.random.default_rng(1).permutation(INPUTS)


def in_mlx(files: dict[str, Array]) -> dict[str, Any]:
    return {name: mx.array(array) for name, array in files.items() if name != "weight_shape"}


def dequantised(matrix: Affine, bits: int) -> npt.NDArray[np.float32]:
    """What MLX itself makes of it, in float32."""
    confirm(matrix.doubts)
    group = matrix.words.shape[1] * 32 // bits // matrix.scales.shape[1]
    scales, biases = matrix.scales.astype(mx.float32), matrix.biases.astype(mx.float32)
    packed = np.array(mx.dequantize(matrix.words, scales, biases, group_size=group, bits=bits))
    if matrix.inputs is None:
        return packed
    result = np.empty_like(packed)
    result[:, np.array(matrix.inputs)] = packed
    return result


def assert_same(matrix: Affine, quantised: Quantised) -> None:
    np.testing.assert_array_equal(dequantised(matrix, quantised.bits), quantised.dequantised)


def of_gptq(quantised: Quantised, version: int = 1, *, symmetric: bool = False, reordered: bool = False) -> Affine:
    files = in_mlx(integer_formats.gptq(quantised, version=version))
    return from_gptq(
        **files,
        bits=quantised.bits,
        symmetric=symmetric,
        zeros_are_one_less=version == 1,
        reordered=reordered,
        dtype=mx.float16,
    )


@pytest.mark.parametrize("group", [32, 64, 128, 256, INPUTS])
def test_awq_matrices_are_exact(group: int) -> None:
    quantised = integer_formats.quantise(weights(), group=group)
    assert_same(from_awq(**in_mlx(integer_formats.awq(quantised)), dtype=mx.float16), quantised)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reordered", [False, True])
def test_gptq_matrices_are_exact(bits: int, version: int, symmetric: bool, reordered: bool) -> None:
    order = shuffled() if reordered else None
    quantised = integer_formats.quantise(weights(), bits=bits, symmetric=symmetric, order=order)
    matrix = of_gptq(quantised, version, symmetric=symmetric, reordered=reordered)
    assert matrix.scales.dtype == matrix.biases.dtype == (mx.float16 if symmetric else mx.float32)
    assert (matrix.inputs is not None) is reordered
    assert_same(matrix, quantised)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reordered", [False, True])
def test_compressed_tensors_matrices_are_exact(bits: int, symmetric: bool, reordered: bool) -> None:
    order = shuffled() if reordered else None
    quantised = integer_formats.quantise(weights()[:41], bits=bits, symmetric=symmetric, order=order)
    files = in_mlx(integer_formats.compressed(quantised, symmetric=symmetric))
    zeros, groups = files.get("weight_zero_point"), files.get("weight_g_idx")
    packed, scale = files["weight_packed"], files["weight_scale"]
    assert_same(
        from_pack_quantized(packed, scale, zeros, groups, bits=bits, reordered=reordered, dtype=mx.float16), quantised
    )


def test_large_matrices_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repack, "_PART_BYTES", 5 * 4 * INPUTS)
    plain, ordered = (integer_formats.quantise(weights(), order=order) for order in (None, shuffled()))
    assert_same(from_awq(**in_mlx(integer_formats.awq(plain)), dtype=mx.float16), plain)
    assert_same(of_gptq(ordered, reordered=True), ordered)


def test_symmetric_matrices_keep_the_type_of_their_scales() -> None:
    quantised = integer_formats.quantise(weights(), symmetric=True)
    files = in_mlx(integer_formats.compressed(quantised, symmetric=True))
    packed, scale = files["weight_packed"], files["weight_scale"]
    same = from_pack_quantized(packed, scale, None, None, bits=4, reordered=False, dtype=mx.float16)
    assert same.scales.dtype == same.biases.dtype == mx.float16
    other = from_pack_quantized(packed, scale, None, None, bits=4, reordered=False, dtype=mx.bfloat16)
    assert other.scales.dtype == other.biases.dtype == mx.float32
    assert_same(other, quantised)


def test_zeros_off_the_middle_of_a_symmetric_matrix_are_refused() -> None:
    with pytest.raises(ModelError, match="the files hold zeros off the middle"):
        confirm(of_gptq(integer_formats.quantise(weights()), symmetric=True).doubts)


@pytest.mark.parametrize("reordered", [False, True])
def test_an_order_that_was_never_set_is_none(reordered: bool) -> None:
    quantised = integer_formats.quantise(weights(), symmetric=True)
    files = in_mlx(integer_formats.compressed(quantised, symmetric=True))
    never = mx.full((INPUTS,), -1, dtype=mx.int32)
    packed, scale = files["weight_packed"], files["weight_scale"]
    matrix = from_pack_quantized(packed, scale, None, never, bits=4, reordered=reordered, dtype=mx.float16)
    assert_same(matrix, quantised)


def test_an_order_that_is_not_stated_is_refused() -> None:
    matrix = of_gptq(integer_formats.quantise(weights(), order=shuffled()))
    with pytest.raises(ModelError, match="g_idx says that they do not"):
        confirm(matrix.doubts)


@pytest.mark.parametrize("damage", [lambda g: g * 0, lambda g: g + 1, lambda g: -g])
def test_columns_in_groups_that_do_not_exist_or_are_too_large_are_refused(damage: Any) -> None:
    files = in_mlx(integer_formats.gptq(integer_formats.quantise(weights(), order=shuffled())))
    files["g_idx"] = damage(files["g_idx"])
    how = {"bits": 4, "symmetric": False, "zeros_are_one_less": True, "reordered": True}
    matrix = from_gptq(**files, **how, dtype=mx.float16)
    with pytest.raises(ModelError, match="expected 32 columns in each of 16 groups"):
        confirm(matrix.doubts)


def test_groups_that_mlx_does_not_have_are_refused() -> None:
    quantised = integer_formats.quantise(weights(), group=16)
    with pytest.raises(ModelError, match="groups of 32 columns and multiples of it; these have 16"):
        of_gptq(quantised)


def half_precision_error(output: Any, x: Any, weight: npt.NDArray[np.float32]) -> float:
    """The largest difference from the exact product, as a part of what rounding it to float16 may cost."""
    exact = np.array(x.astype(mx.float32)).astype(np.float64) @ weight.astype(np.float64).T
    assert output.dtype == mx.float16
    return float((np.abs(np.array(output) - exact) / np.spacing(np.abs(exact).astype(np.float16))).max())


@pytest.mark.parametrize("reordered", [False, True])
def test_a_linear_whose_biases_are_wider_than_float16_rounds_once(reordered: bool) -> None:
    quantised = integer_formats.quantise(weights(), order=shuffled() if reordered else None)
    matrix = of_gptq(quantised, reordered=reordered)
    linear = ExactLinear(nn.QuantizedLinear(INPUTS, ROWS, False, 32, 4), has_order=reordered)
    linear.weight, linear.scales, linear.biases = matrix.words, matrix.scales, matrix.biases
    if matrix.inputs is not None:
        linear.inputs = matrix.inputs
    x = (mx.random.normal((5, INPUTS), key=mx.random.key(0)) + 1).astype(mx.float16)
    assert half_precision_error(linear(x), x, quantised.dequantised) < 0.51


@pytest.mark.parametrize("reordered", [False, True])
def test_experts_whose_biases_are_wider_than_float16_round_once(reordered: bool) -> None:
    orders = [np.random.default_rng(seed).permutation(INPUTS) if reordered else None for seed in (1, 2)]
    both = [
        integer_formats.quantise(values, order=order)
        for values, order in zip((weights(), -weights()), orders, strict=True)
    ]
    matrices = [of_gptq(quantised, reordered=reordered) for quantised in both]
    packed = SwitchLinear(INPUTS, ROWS, 2, bias=False).to_quantized(32, 4)
    switch = ExactSwitchLinear(packed, has_order=reordered)
    for name in ("words", "scales", "biases", *(("inputs",) if reordered else ())):
        stacked = mx.stack([getattr(matrix, name) for matrix in matrices])
        setattr(switch, "weight" if name == "words" else name, stacked)
    x = (mx.random.normal((5, 1, 1, INPUTS), key=mx.random.key(0)) + 1).astype(mx.float16)
    output = switch(x, mx.array([[0, 1]] * 5))
    assert output.shape == (5, 2, 1, ROWS)
    for expert, quantised in enumerate(both):
        assert half_precision_error(output[:, expert, 0], x[:, 0, 0], quantised.dequantised) < 0.51
