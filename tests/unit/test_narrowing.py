"""cluster/narrowing.py: what eight bits keep of activations."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.narrowing import GROUP, NarrowTensor, error_of, narrow, narrow_bytes, widen
from cluster.types import DType, HostTensor
from node.comparison import Floats, from_host, to_host

FLOATS = (DType.BF16, DType.F16, DType.F32)


def sent(values: Floats, dtype: DType = DType.F32) -> Floats:
    """As the next stage has them."""
    return from_host(widen(narrow(to_host(values, dtype))))


def random(tokens: int, width: int) -> Floats:
    return np.random.default_rng(tokens * width).standard_normal((tokens, width)).astype(np.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 31), (5, 33), (7, 64), (40, 1000), (2, 40_000)])
def test_numbers_come_back_within_half_a_level_of_their_group(dtype: DType, tokens: int, width: int) -> None:
    values = from_host(to_host(random(tokens, width), dtype))
    found = sent(values, dtype)
    assert found.shape == values.shape
    groups = -(-width // GROUP)
    for group in range(groups):
        members = slice(group, None, groups)
        largest = np.abs(values[:, members]).max(axis=1, keepdims=True)
        # Half of a level, a scale that was rounded up by at most a 128th, and the type's own rounding.
        allowed = largest * (0.5 / 127) * (1 + 1 / 128) + np.abs(values[:, members]) / 256 + 1e-7
        assert (np.abs(found[:, members] - values[:, members]) <= allowed).all()


def test_a_number_beyond_all_others_costs_its_group_alone() -> None:
    values = random(4, 1024)
    calm = np.abs(sent(values) - values)
    values[2, 100] = 5000.0
    off = np.abs(sent(values) - values)
    spoilt = np.argwhere(off != calm)
    assert {int(token) for token, _ in spoilt} == {2}
    assert {int(at) % (1024 // GROUP) for _, at in spoilt} <= {100 % (1024 // GROUP)}


def test_zeros_stay_zeros() -> None:
    assert not sent(np.zeros((2, 64), np.float32)).any()


@pytest.mark.parametrize("width", [1, 31, 64])
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        *((DType.F32, bits) for bits in (0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFF0000, 0x7FFF0001, 0x7FFFFFFF)),
        *((DType.F16, bits) for bits in (0x7C00, 0x7C01, 0x7E00, 0x7FFF)),
        *((DType.BF16, bits) for bits in (0x7F80, 0x7F81, 0x7FC0, 0x7FFF)),
    ],
)
def test_what_is_no_number_stays_none_whatever_its_bits(dtype: DType, bits: int, width: int) -> None:
    stored = np.uint32 if dtype is DType.F32 else np.uint16
    sign = 1 << (8 * dtype.size_bytes - 1)
    for wrong in (bits, bits | sign):
        numbers = np.frombuffer(to_host(random(2, width), dtype).data, stored).reshape(2, width).copy()
        numbers[1, width // 2] = wrong
        found = from_host(widen(narrow(HostTensor(dtype, (2, width), numbers.tobytes()))))
        assert np.isfinite(found[0]).all()
        assert not np.isfinite(found[1, width // 2]), hex(wrong)


def test_the_ends_of_a_type_do_not_overflow() -> None:
    values = np.full((1, 64), 65_504.0, np.float32)
    values[0, ::3] = -65_504.0
    np.testing.assert_allclose(sent(values, DType.F16), values, rtol=0.01)
    tiny = np.full((1, 64), 1e-30, np.float32)
    np.testing.assert_allclose(sent(tiny), tiny, rtol=0.01)


def test_it_takes_thirty_four_bytes_for_thirty_two_numbers() -> None:
    assert narrow_bytes((10, 1024)) * 32 == 34 * 10 * 1024
    assert narrow_bytes((3, 4, 8)) == narrow_bytes((3, 32))
    assert narrow_bytes((0, 64)) == 0
    assert widen(narrow(HostTensor(DType.BF16, (0, 64), b""))).shape == (0, 64)


def test_a_tensor_of_another_size_is_no_narrow_tensor() -> None:
    with pytest.raises(ValueError, match="takes 68 bytes"):
        NarrowTensor(DType.BF16, (2, 32), bytes(64))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_error_told_is_that_of_what_arrives(dtype: DType) -> None:
    values = from_host(to_host(random(32, 64), dtype))
    difference = sent(values, dtype) - values
    assert error_of(to_host(values, dtype)) == pytest.approx(np.sqrt((difference**2).mean() / (values**2).mean()))


def test_the_error_of_many_tokens_is_told_from_some_all_over() -> None:
    values = random(1000, 64)
    values[500:, 0] = 100.0  # costs the others of its group their precision
    whole = sent(values) - values
    found = error_of(to_host(values, DType.F32))
    assert found == pytest.approx(np.sqrt((whole**2).mean() / (values**2).mean()), rel=0.1)


@pytest.mark.parametrize("number", [0.0, np.inf, np.nan])
def test_where_nothing_can_be_compared_there_is_no_error(number: float) -> None:
    values = np.full((2, 64), number, np.float32)
    assert error_of(to_host(values, DType.F32)) is None
