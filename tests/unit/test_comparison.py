"""How errors are measured, and how large they may be."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.types import DType
from node.comparison import (
    REROUTED,
    TOLERANCES,
    errors_of,
    from_host,
    summary,
    to_host,
    tolerance,
)


def test_tolerance_grows_with_the_root_of_the_layers() -> None:
    for dtype, known in TOLERANCES.items():
        assert tolerance(dtype, 1, same=True, routed=False) == known.same
        assert tolerance(dtype, 1, same=False, routed=False) == known.other > known.same
        assert tolerance(dtype, 9, same=True, routed=False) == pytest.approx(3 * known.same)


def test_experts_in_16_bits_widen_the_tolerance_of_several_layers_and_of_nothing_else() -> None:
    known = TOLERANCES[DType.F16]
    assert tolerance(DType.F16, 2, same=True, routed=True) == REROUTED
    assert tolerance(DType.F16, 1, same=True, routed=True) == known.same
    assert tolerance(DType.F32, 2, same=True, routed=True) < REROUTED


def test_errors_are_relative_to_the_rms_of_each_token() -> None:
    expected = np.array([[3.0, -3, 3, -3], [30, 30, -30, -30]], np.float32)
    errors = errors_of(expected + np.float32(0.3), expected, [expected])
    np.testing.assert_allclose(errors, [0.1, 0.01], rtol=1e-5)


def test_errors_of_an_outsized_element_are_relative_to_itself() -> None:
    expected = np.full((1, 1024), 1.0, np.float32)
    expected[0, 5] = 1000.0
    found = expected.copy()
    found[0, 5] += 4.0  # one step of BF16 there
    assert errors_of(found, expected, [expected]) == pytest.approx(0.004)


def test_errors_are_measured_by_the_largest_state_on_the_way() -> None:
    """A layer that takes 1000 away leaves its rounding behind."""
    entering, expected = np.full((1, 4), 1000.0, np.float32), np.full((1, 4), 1.0, np.float32)
    assert errors_of(expected + 4, expected, [entering, expected]) == pytest.approx(0.004)
    assert errors_of(expected + 4, expected, [expected]) == pytest.approx(4.0)


def test_the_worst_token_counts_but_with_experts_in_16_bits_the_median_one() -> None:
    errors = np.array([0.1, 0.1, 0.2, 0.9], np.float32)
    assert summary(errors, DType.BF16, routed=False) == pytest.approx(0.9)
    assert summary(errors, DType.F32, routed=True) == pytest.approx(0.9)
    assert summary(errors, DType.BF16, routed=True) == pytest.approx(0.15)


@pytest.mark.parametrize(("dtype", "mantissa_bits"), [(DType.F32, 23), (DType.F16, 10), (DType.BF16, 7)])
def test_what_a_dtype_can_say_reaches_a_stage_exactly(dtype: DType, mantissa_bits: int) -> None:
    steps = np.arange(2**mantissa_bits, 2**mantissa_bits + 100, dtype=np.float32)
    values = (np.outer([1, -1], steps) * np.float32(2.0**-mantissa_bits)).astype(np.float32)
    tensor = to_host(values, dtype)
    assert (tensor.dtype, tensor.shape) == (dtype, (2, 100))
    np.testing.assert_array_equal(from_host(tensor), values)


def test_what_bf16_cannot_say_is_rounded_to_the_nearest_and_to_even() -> None:
    step = 2.0**-7
    values = np.array([1 + 0.4 * step, 1 + 0.6 * step, 1 + 0.5 * step, 1 + 1.5 * step, -1 - 0.6 * step], np.float32)
    expected = np.array([1, 1 + step, 1, 1 + 2 * step, -1 - step], np.float32)
    np.testing.assert_array_equal(from_host(to_host(values, DType.BF16)), expected)
