"""Matrices of AWQ, GPTQ and compressed-tensors files, bit for bit what their definitions say."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cluster.errors import ModelError
from node.engines.torch import repack
from node.engines.torch.repack import Affine, from_awq, from_gptq, from_pack_quantized
from tests import integer_formats
from tests.integer_formats import Array, Quantised

ROWS, INPUTS = 48, 256


def weights(seed: int = 0) -> npt.NDArray[np.float32]:
    """Rows whose groups have zeros all over the range, 0 and the largest among them."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(ROWS, INPUTS)) + generator.normal(size=(ROWS, 1))
    values[0], values[1] = np.abs(values[0]), -np.abs(values[1])
    return values.astype(np.float32)


def shuffled(seed: int = 1) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(INPUTS)


def in_torch(files: dict[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in files.items() if name != "weight_shape"}


def dequantised(matrix: Affine, bits: int) -> npt.NDArray[np.float32]:
    """By the definition of the affine form: the first column in a word's lowest bits."""
    words = matrix.words.numpy().view(np.uint32)
    codes = np.stack([(words >> place) & ((1 << bits) - 1) for place in range(0, 32, bits)], -1)
    codes = codes.reshape(words.shape[0], -1).astype(np.float32)
    width = codes.shape[1] // matrix.scales.shape[1]
    scales, biases = (part.float().numpy().repeat(width, 1) for part in (matrix.scales, matrix.biases))
    packed = codes * scales + biases
    if matrix.inputs is None:
        return packed
    result = np.empty_like(packed)
    result[:, matrix.inputs.numpy()] = packed
    return result


def assert_same(matrix: Affine, quantised: Quantised) -> None:
    np.testing.assert_array_equal(dequantised(matrix, quantised.bits), quantised.dequantised)


@pytest.mark.parametrize("group", [32, 128, INPUTS])
def test_awq_matrices_are_exact(group: int) -> None:
    quantised = integer_formats.quantise(weights(), group=group)
    assert set(quantised.zeros.flat) >= {0, 15}
    assert_same(from_awq(**in_torch(integer_formats.awq(quantised))), quantised)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_matrices_are_exact(bits: int, version: int, symmetric: bool) -> None:
    quantised = integer_formats.quantise(weights(), bits=bits, symmetric=symmetric)
    files = in_torch(integer_formats.gptq(quantised, version=version))
    matrix = from_gptq(**files, bits=bits, symmetric=symmetric, zeros_are_one_less=version == 1, reordered=False)
    assert matrix.inputs is None
    assert matrix.biases.dtype is (torch.float16 if symmetric else torch.float32)
    assert_same(matrix, quantised)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_columns_in_the_order_of_activations_are_exact(bits: int) -> None:
    quantised = integer_formats.quantise(weights(), bits=bits, order=shuffled())
    matrix = from_gptq(
        **in_torch(integer_formats.gptq(quantised)), bits=bits, symmetric=False, zeros_are_one_less=True, reordered=True
    )
    assert matrix.inputs is not None
    assert_same(matrix, quantised)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reordered", [False, True])
def test_compressed_tensors_matrices_are_exact(bits: int, symmetric: bool, reordered: bool) -> None:
    order = shuffled() if reordered else None
    quantised = integer_formats.quantise(weights()[:41], bits=bits, symmetric=symmetric, order=order)
    files = in_torch(integer_formats.compressed(quantised, symmetric=symmetric))
    zeros, groups = files.get("weight_zero_point"), files.get("weight_g_idx")
    matrix = from_pack_quantized(
        files["weight_packed"], files["weight_scale"], zeros, groups, bits=bits, reordered=reordered
    )
    assert (matrix.inputs is not None) is reordered
    assert_same(matrix, quantised)


def test_large_matrices_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repack, "_TRANSIENT_BYTES", 5 * 4 * INPUTS)
    plain, ordered = (integer_formats.quantise(weights(), order=order) for order in (None, shuffled()))
    assert_same(from_awq(**in_torch(integer_formats.awq(plain))), plain)
    files = in_torch(integer_formats.gptq(ordered))
    assert_same(from_gptq(**files, bits=4, symmetric=False, zeros_are_one_less=True, reordered=True), ordered)


def test_symmetric_matrices_keep_the_type_of_their_scales() -> None:
    """Which no other zero could: a float16 holds eleven bits, and a zero has four more."""
    quantised = integer_formats.quantise(weights(), symmetric=True)
    files = in_torch(integer_formats.compressed(quantised, symmetric=True))
    matrix = from_pack_quantized(files["weight_packed"], files["weight_scale"], None, None, bits=4, reordered=False)
    assert matrix.scales.dtype == matrix.biases.dtype == torch.float16


def test_zeros_off_the_middle_of_a_symmetric_matrix_are_refused() -> None:
    files = in_torch(integer_formats.gptq(integer_formats.quantise(weights())))
    with pytest.raises(ModelError, match="the files hold zeros off the middle"):
        from_gptq(**files, bits=4, symmetric=True, zeros_are_one_less=True, reordered=True)


def test_an_order_that_was_never_set_is_none() -> None:
    quantised = integer_formats.quantise(weights(), symmetric=True)
    files = in_torch(integer_formats.compressed(quantised, symmetric=True))
    never = torch.full((INPUTS,), -1, dtype=torch.int32)
    assert (
        from_pack_quantized(files["weight_packed"], files["weight_scale"], None, never, bits=4, reordered=True).inputs
        is None
    )


def test_an_order_that_is_not_stated_is_refused() -> None:
    files = in_torch(integer_formats.gptq(integer_formats.quantise(weights(), order=shuffled())))
    with pytest.raises(ModelError, match="g_idx says that they do not"):
        from_gptq(**files, bits=4, symmetric=False, zeros_are_one_less=True, reordered=False)


@pytest.mark.parametrize("damage", [lambda g: g.fill_(0), lambda g: g.add_(1), lambda g: g.neg_()])
def test_columns_in_groups_that_do_not_exist_or_are_too_large_are_refused(damage: object) -> None:
    files = in_torch(integer_formats.gptq(integer_formats.quantise(weights(), order=shuffled())))
    assert callable(damage)
    damage(files["g_idx"])
    with pytest.raises(ModelError, match="expected 32 columns in each of 8 groups"):
        from_gptq(**files, bits=4, symmetric=False, zeros_are_one_less=True, reordered=True)
