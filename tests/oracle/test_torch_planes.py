"""Packed matrices as planes of four bits, which a processor's kernel multiplies: products as exact as the type allows,
the same numbers taken back, little memory beside them, and none where the kernel does not do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("mlx", reason="MLX packs the matrices")

import mlx.core as mx
from torch.nn.functional import linear

from cluster.limits import UNPACKED_ON_CPU_BYTES_MAX
from node.engines.torch import int4
from node.engines.torch.in_planes import in_planes
from node.engines.torch.int4 import Order
from node.engines.torch.packed import Affine, rows_of
from node.engines.torch.planes import Planes
from node.engines.torch.products import Whole
from tests.oracle.packed_matrices import (
    COLUMNS,
    ROWS,
    affine,
    in_torch,
    kernel,
    needs_kernel,
    peak_bytes,
    random,
    relative_error,
)

BITS = (2, 3, 4, 5, 6, 8)
WIDTHS = [(bits, group, COLUMNS) for bits in BITS for group in (32, 64, 128)]
WIDTHS += [(bits, 32, columns) for bits in BITS for columns in (96, 160)]


@needs_kernel
@pytest.mark.parametrize(("bits", "group", "columns"), WIDTHS)
@pytest.mark.parametrize("tokens", [1, 5, 24])
def test_products_of_planes_are_as_exact_as_bfloat16(bits: int, group: int, columns: int, tokens: int) -> None:
    matrix, numbers = affine(bits, group, mx.bfloat16, columns)
    x = in_torch(random(tokens, columns, seed=1)).bfloat16()
    exact = x.float() @ numbers.T
    planes = kernel(matrix)
    assert planes is not None
    error = relative_error(linear(x, Whole(planes, torch.bfloat16)), exact)  # type: ignore[arg-type]
    assert error <= relative_error(linear(x, numbers.bfloat16()), exact)
    assert sum(tensor.nbytes for tensor in planes.tensors) == sum(
        tensor.nbytes for tensor in (matrix.codes, matrix.scales, matrix.biases)
    )


@needs_kernel
@pytest.mark.parametrize(("bits", "group", "columns"), WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_many_rows_of_input_are_multiplied_as_exactly(
    bits: int, group: int, columns: int, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By unpacked weights; a tenth more error for the two numbers that hold an input's sum over a group."""
    monkeypatch.setattr("node.engines.torch.planes._kernel_rows", lambda planes: 99)
    monkeypatch.setattr("node.engines.torch.planes._UNPACKED_ELEMENTS", 128 * COLUMNS)
    matrix, numbers = affine(bits, group, mx.bfloat16, columns)
    x = in_torch(random(100, columns, offset=offset, seed=1)).bfloat16()
    exact = x.float() @ numbers.T
    planes = kernel(matrix)
    assert planes is not None
    error = relative_error(planes.product(x.view(4, 25, -1)).flatten(0, 1), exact)
    assert error <= 1.1 * relative_error(linear(x, numbers.bfloat16()), exact)


@needs_kernel
@pytest.mark.parametrize(("bits", "group", "columns"), WIDTHS)
def test_rows_of_planes_are_looked_up_exactly(bits: int, group: int, columns: int) -> None:
    matrix, exact = affine(bits, group, mx.bfloat16, columns)
    planes = kernel(matrix, looked_up=True)
    assert planes is not None
    rows = torch.tensor([191, 0, 64, 100, 100])
    assert torch.equal(planes.values(rows), exact[rows])


@needs_kernel
@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_planes_in_pieces_are_taken_apart_some_rows_at_a_time(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planes, x = kernel(affine(bits, 64, mx.bfloat16)[0]), in_torch(random(3, COLUMNS, seed=1)).bfloat16()
    assert planes is not None
    whole = planes.product(x)
    monkeypatch.setattr("node.engines.torch.planes._EXPANDED_BYTES", 1)
    sizes: list[int] = []
    expanded = Planes._expanded
    monkeypatch.setattr(
        Planes, "_expanded", lambda m, rows, order: (sizes.append(rows.stop), expanded(m, rows, order))[1]
    )
    assert torch.equal(planes.product(x), whole)
    order = int4.order_of_codes()
    assert order is not None
    block = 2 * order.stride
    assert sizes == list(range(block, ROWS + block, block))


@needs_kernel
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_inputs_may_be_a_part_of_others_or_none(bits: int) -> None:
    planes, wide = kernel(affine(bits, 64, mx.bfloat16)[0]), in_torch(random(3, 2 * COLUMNS, seed=1)).bfloat16()
    assert planes is not None
    part = wide[:, COLUMNS:]
    assert torch.equal(planes.product(part), planes.product(part.clone()))
    assert planes.product(part[None, :0]).shape == (1, 0, ROWS)


@needs_kernel
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_groups_whose_scale_is_zero_are_their_bias(bits: int) -> None:
    matrix, _ = affine(bits, 64, mx.bfloat16)
    flat = Affine(matrix.codes, torch.zeros_like(matrix.scales), torch.ones_like(matrix.biases), bits)
    planes = kernel(flat)
    assert planes is not None
    assert torch.equal(planes.product(torch.ones(1, COLUMNS).bfloat16()), torch.full((1, ROWS), COLUMNS).bfloat16())


@needs_kernel
@pytest.mark.parametrize("bits", BITS)
def test_some_columns_at_a_time_are_the_same_matrix(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight where codes are put in order, and 256 where they are unpacked, of 22 groups."""
    matrix, _ = affine(bits, 32, mx.bfloat16, columns=704)
    whole, x = kernel(matrix), in_torch(random(100, 704, seed=1)).bfloat16()
    assert whole is not None
    unpacked = whole.product(x)
    monkeypatch.setattr("node.engines.torch.in_planes._CHUNK_ELEMENTS", 1)
    monkeypatch.setattr("node.engines.torch.planes._CENTRED_ELEMENTS", 1)
    monkeypatch.setattr("node.engines.torch.planes._SCALING_BYTES", 1)
    found = kernel(matrix)
    assert found is not None
    assert torch.equal(found.codes, whole.codes)
    assert torch.equal(found.product(x), unpacked)
    assert torch.equal(found.product(x[:3]), whole.product(x[:3]))


@needs_kernel
@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize(("rows", "columns"), [(128, 28672), (16384, 2048), (64, 57344)])
def test_what_planes_take_beside_them_is_bounded(bits: int, rows: int, columns: int) -> None:
    """Of wide matrices and of large ones: in order, and multiplied with one row of input and many."""
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8)
    scales = torch.ones(rows, columns // 32).bfloat16()
    made: list[Planes | None] = []
    packed = Affine(codes, scales, -scales * 2 ** (bits - 1), bits)
    loaded_bytes = peak_bytes(lambda: made.extend(in_planes([packed], torch.bfloat16, looked_up=False) or ()))
    (planes,) = made
    assert planes is not None
    assert loaded_bytes - planes.scaling.nbytes <= UNPACKED_ON_CPU_BYTES_MAX
    for tokens in (1, 80):
        x = torch.ones(tokens, columns).bfloat16()
        copies = 1 if columns <= 28672 and tokens > 1 else 2  # of the input, once for each plane in the kernel
        beside_bytes = peak_bytes(lambda x=x: planes.product(x)) - copies * x.nbytes - 2 * tokens * rows
        assert beside_bytes <= UNPACKED_ON_CPU_BYTES_MAX, tokens


def test_a_group_whose_scale_is_no_number_stays_so() -> None:
    """Its file is damaged; the general path's products would show it."""
    matrix, _ = affine(8, 64, mx.bfloat16)
    scales = matrix.scales.clone()
    scales[3, 1] = torch.nan
    planes = kernel(Affine(matrix.codes, scales, matrix.biases, matrix.bits))
    assert planes is None or bool(planes.product(torch.ones(1, COLUMNS).bfloat16())[0, 3].isnan())


def test_what_the_kernel_would_lose_is_left_to_the_general_path() -> None:
    """Weights far from zero, whose zeros are rounded more coarsely than their differences."""
    assert kernel(affine(4, 64, mx.bfloat16, offset=40.0)[0]) is None


@pytest.mark.parametrize("unfit", [rows_of(affine()[0], 0, 24), rows_of(affine(6)[0], 0, 32)])
def test_what_the_kernel_does_not_compute_is_left_to_the_general_path(unfit: Affine) -> None:
    assert kernel(unfit) is None


@needs_kernel
def test_planes_need_an_order_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.engines.torch.int4.order_of_codes", lambda: None)
    assert kernel(affine(6)[0]) is kernel(affine(4)[0]) is None


@pytest.mark.parametrize(
    ("machine", "capability", "cut", "is_used"),
    [
        ("x86_64", "DEFAULT", False, False),
        ("x86_64", "AVX2", False, True),
        ("aarch64", "DEFAULT", True, False),
        ("aarch64", "DEFAULT", False, True),
    ],
)
def test_a_kernel_that_is_slow_or_cuts_bits_off_is_not_used(
    machine: str, capability: str, cut: bool, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(x: torch.Tensor, codes: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
        """Of weights that are all one, as the two kinds of processors store its sums."""
        sums = x.float().sum(-1, keepdim=True).expand(-1, len(codes))
        if cut:
            sums = (sums.contiguous().view(torch.int32) & -0x10000).view(torch.float32)
        return sums.bfloat16()

    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(int4, "product", product)
    int4.is_usable.cache_clear()
    try:
        assert (kernel(affine(4, 64, mx.bfloat16)[0]) is not None) == is_used
    finally:
        int4.is_usable.cache_clear()


def test_neighbours_in_a_byte_are_put_in_order() -> None:
    """As processors without wide registers have them."""
    order = Order(stride=2, offsets=(0, 0, 1, 1), shifts=(0, 4, 0, 4))
    assert order.rows is not None
    assert order.rows.tolist() == [0, 2, 1, 3]
