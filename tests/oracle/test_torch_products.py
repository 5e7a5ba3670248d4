"""Packed matrices in torch's memory: the numbers that MLX unpacks, cut and gathered anywhere, and products as exact
as the type allows."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("mlx", reason="MLX packs the matrices")

import mlx.core as mx
from torch.nn.functional import embedding, linear

from cluster.errors import ModelError
from cluster.limits import UNPACKED_ON_CPU_BYTES_MAX
from node.engines.torch import products
from node.engines.torch.packed import Packed, gathered, rows_of
from node.engines.torch.products import Joined, Stack, Whole
from tests.oracle.packed_matrices import (
    COLUMNS,
    ROWS,
    affine,
    fp8,
    in_torch,
    kernel,
    mxfp4,
    peak_bytes,
    random,
    relative_error,
)

PACKED: dict[str, Any] = {
    **{f"affine {bits} bits": lambda bits=bits: affine(bits) for bits in (2, 3, 4, 5, 6, 8)},
    "affine in groups of 32": lambda: affine(4, 32),
    "affine with scales of 16 bits": lambda: affine(4, 128, mx.bfloat16),
    "mxfp4": mxfp4,
    "fp8 in blocks": lambda: fp8(128, 128),
    "fp8 in blocks that do not fit": lambda: fp8(100, 120),
    "fp8 by rows": lambda: fp8(1, COLUMNS),
    "fp8 with one scale": lambda: fp8(ROWS, COLUMNS),
}


@pytest.fixture(params=PACKED)
def packed(request: pytest.FixtureRequest) -> tuple[Packed, torch.Tensor]:
    made: tuple[Packed, torch.Tensor] = PACKED[request.param]()
    return made


def test_numbers_are_what_the_format_says(packed: tuple[Packed, torch.Tensor]) -> None:
    matrix, exact = packed
    assert torch.equal(matrix.values(), exact)


def test_any_rows_are_the_same_numbers(packed: tuple[Packed, torch.Tensor]) -> None:
    matrix, exact = packed
    for first, last in ((0, 3), (97, 190), (128, 192)):
        part = rows_of(matrix, first, last)
        assert torch.equal(part.values(), exact[first:last])
        assert torch.equal(rows_of(part, 1, 3).values(), exact[first + 1 : first + 3])
        assert torch.equal(gathered(part, torch.tensor([2, 0])).values(), exact[[first + 2, first]])


def test_products_unpack_some_rows_at_a_time(
    packed: tuple[Packed, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_CHUNK_ELEMENTS", {"cpu": 50 * COLUMNS})
    matrix, exact = packed
    sizes: list[int] = []
    values = type(matrix).values
    monkeypatch.setattr(type(matrix), "values", lambda part: (sizes.append(part.rows), values(part))[1])
    x, bias = in_torch(random(2, 3, COLUMNS, seed=1)), in_torch(random(ROWS, seed=2))
    found = linear(x, Whole(matrix, torch.float32), bias)  # type: ignore[arg-type]
    torch.testing.assert_close(found, linear(x, exact, bias), rtol=1e-5, atol=1e-4)
    assert sizes == [50, 50, 50, 42]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_16_bits_are_as_exact_as_rounded_weights(
    packed: tuple[Packed, torch.Tensor], dtype: torch.dtype, tokens: int
) -> None:
    """A single row's weights are not even rounded."""
    matrix, numbers = packed
    x = in_torch(random(tokens, COLUMNS, seed=1)).to(dtype)
    found, exact = Whole(matrix, dtype).product(x), x.float() @ numbers.T
    assert found.dtype is dtype
    assert relative_error(found, exact) <= relative_error(linear(x, numbers.to(dtype)), exact)


def test_rows_are_looked_up(packed: tuple[Packed, torch.Tensor]) -> None:
    matrix, exact = packed
    ids = torch.tensor([[3, 191], [0, 3]])
    assert torch.equal(embedding(ids, Whole(matrix, torch.float32)), exact[ids])  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_long_prompt_is_looked_up_some_rows_at_a_time(bits: int) -> None:
    matrix, _ = affine(bits, 64, mx.bfloat16)
    for packed in (matrix, kernel(matrix, looked_up=True)):
        if packed is not None:
            whole, ids = Whole(packed, torch.bfloat16), torch.arange(1 << 15) % 64
            found_bytes = 2 * len(ids) * COLUMNS
            assert peak_bytes(partial(embedding, ids, whole)) <= found_bytes + UNPACKED_ON_CPU_BYTES_MAX
            assert torch.equal(embedding(ids, whole)[:64], embedding(ids[:64], whole))  # type: ignore[arg-type]


def test_columns_may_be_packed_in_another_order() -> None:
    matrix, exact = affine()
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    whole, x = Whole(matrix, torch.float32, order), in_torch(random(3, COLUMNS, seed=1))
    in_order = torch.empty_like(exact)
    in_order[:, order] = exact
    torch.testing.assert_close(whole.product(x), x @ in_order.T, rtol=1e-5, atol=1e-4)
    assert torch.equal(whole.unpacked(5, 9), in_order[5:9])


@pytest.mark.parametrize("in_turns", [False, True])
def test_experts_are_taken_out_of_a_stack_one_by_one(in_turns: bool) -> None:
    (gate, gates), (up, ups) = affine(seed=1), affine(6, seed=2)
    joined = Joined(Whole(gate, torch.float32), Whole(up, torch.float32), in_turns=in_turns)
    x = in_torch(random(3, COLUMNS, seed=3))
    exact = torch.stack((gates, ups), 1).flatten(0, 1) if in_turns else torch.cat((gates, ups))
    stack = Stack([joined, joined], transposed=False)
    assert stack.shape == (2, 2 * ROWS, COLUMNS)
    torch.testing.assert_close(linear(x, stack[torch.tensor(1)]), x @ exact.T, rtol=1e-5, atol=1e-4)  # type: ignore[arg-type]
    turned = Stack([joined], transposed=True)
    assert turned.shape == (1, COLUMNS, 2 * ROWS)
    torch.testing.assert_close(x @ turned[0], x @ exact.T, rtol=1e-5, atol=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize("function", [torch.relu, lambda w: w + 1, lambda w: torch.ones(2, ROWS) @ w])
def test_any_other_function_is_refused_by_name(function: Any) -> None:
    whole = Whole(affine()[0], torch.float32)
    with pytest.raises((ModelError, TypeError), match=r"computes no .+ with packed weights|unsupported operand"):
        function(whole)


def test_an_attribute_that_only_tensors_have_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="knows no view of packed weights"):
        Whole(affine()[0], torch.float32).view(2, -1)
