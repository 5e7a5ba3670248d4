"""Blocks of GGUF's types mean what the format says, and their codes are packed as MLX wants them."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.models.gguf_types import GgmlType
from coordinator.gguf.blocks import CODE_BITS, GROUP, affine, four_bit_floats, numbers, packed
from tests.gguf_blocks import Floats, dequantised, stored

ROWS, COLUMNS = 3, 512


def random_values() -> Floats:
    """Rows of different sizes, so that scales differ from group to group; some of the groups are all zeros."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(ROWS, COLUMNS)) * generator.uniform(0.1, 2.0, size=(ROWS, COLUMNS // 16)).repeat(
        16, 1
    )
    values[1, 64:128] = 0
    return values.astype(np.float32)


def rows_of(kind: GgmlType, data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.frombuffer(data, np.uint8).reshape(ROWS, -1)


@pytest.mark.parametrize("kind", list(CODE_BITS), ids=lambda kind: kind.name)
def test_codes_scales_and_biases_mean_exactly_the_blocks_values(kind: GgmlType) -> None:
    tensor = stored(random_values(), kind.name)
    parts = affine(kind, rows_of(kind, tensor[2]))
    wide = (parts.scales.repeat(GROUP, 1).astype(np.float64) * parts.codes) + parts.biases.repeat(GROUP, 1)
    np.testing.assert_array_equal(wide.astype(np.float32), dequantised(tensor))
    assert parts.codes.max() < 1 << CODE_BITS[kind]


NUMBERS = [GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q6_K]


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: kind.name)
def test_the_other_types_are_numbers(kind: GgmlType) -> None:
    tensor = stored(random_values(), kind.name)
    np.testing.assert_array_equal(numbers(kind, rows_of(kind, tensor[2])), dequantised(tensor))


def test_four_bit_floats_keep_codes_and_exponents() -> None:
    tensor = stored(random_values(), "MXFP4")
    words, exponents = four_bit_floats(rows_of(GgmlType.MXFP4, tensor[2]))
    codes = (words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(ROWS, -1)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = table[codes] * 2.0 ** (exponents.astype(float) - 127).repeat(GROUP, 1)
    np.testing.assert_array_equal(values.astype(np.float32), dequantised(tensor))


def test_every_type_is_read_in_one_of_these_ways() -> None:
    assert {*CODE_BITS, *NUMBERS, GgmlType.MXFP4} == set(GgmlType)


@pytest.mark.parametrize("bits", sorted(set(CODE_BITS.values())))
def test_codes_are_one_stream_of_bits_in_words(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, size=(2, 64), dtype=np.uint8)
    words = packed(codes, bits)
    assert words.shape == (2, 64 * bits // 32)
    for row in range(2):
        stream = sum(int(word) << (32 * at) for at, word in enumerate(words[row]))
        assert [stream >> (bits * at) & ((1 << bits) - 1) for at in range(64)] == codes[row].tolist()


def test_what_is_compared_with_is_near_what_was_stored() -> None:
    """The tests' own quantisers: a wrong one could make a wrong reading look right."""
    values = random_values()
    tops = np.abs(values).reshape(ROWS, -1, 32).max(axis=2)
    for kind in (*CODE_BITS, GgmlType.Q6_K):
        errors = np.abs(dequantised(stored(values, kind.name)) - values).reshape(ROWS, -1, 32).max(axis=2)
        steps = 2 ** (CODE_BITS.get(kind, 6) - 1)
        assert (errors <= 2.5 * tops.max() / steps).all(), kind
        assert (errors > 0).any()
