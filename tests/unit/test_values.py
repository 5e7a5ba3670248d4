"""The small values: sizes, addresses, ranges, plans, leases."""

from __future__ import annotations

import pytest

from cluster.addresses import is_loopback, split_host_port
from cluster.errors import NodeRefused, UsageError
from cluster.limits import LEASE_TTL_S
from cluster.plan import Plan, Stage
from cluster.quantities import GIB, MIB, format_bytes, parse_fraction, parse_size_bytes
from cluster.types import Backend, CoordinatorId, DType, HostTensor, LayerRange, NodeId
from node.lease import Lease

A, B = CoordinatorId("a" * 32), CoordinatorId("b" * 32)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * GIB), ("1.5 gib", 3 * GIB // 2), ("512MB", 512_000_000), ("4096", 4096), ("2g", 2 * GIB)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8 GiBs", "1e3", "8,5GiB"])
def test_a_size_that_is_none_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="8GiB"):
        parse_size_bytes(text)


@pytest.mark.parametrize(("text", "share"), [("15%", 0.15), ("0.15", 0.15), ("0%", 0.0)])
def test_shares_are_read_in_percent_or_plain(text: str, share: float) -> None:
    assert parse_fraction(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["100%", "-1%", "lots", "", "nan"])
def test_a_share_that_leaves_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="15%"):
        parse_fraction(text)


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * MIB, "5.0 MiB")])
def test_sizes_are_shown_with_three_digits(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("text", "parts"),
    [("10.0.0.5:7433", ("10.0.0.5", 7433)), ("[fd00::5]:1", ("fd00::5", 1)), ("box.local:65535", ("box.local", 65535))],
)
def test_addresses_are_read(text: str, parts: tuple[str, int]) -> None:
    assert split_host_port(text) == parts


@pytest.mark.parametrize("text", ["10.0.0.5", ":80", "host:", "host:0", "host:65536", "fd00::5:7433", "host:http"])
def test_an_address_that_is_none_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="found"):
        split_host_port(text)


@pytest.mark.parametrize(
    ("host", "ours"), [("127.0.0.9", True), ("::1", True), ("localhost", True), ("10.0.0.1", False)]
)
def test_loopback_is_known(host: str, ours: bool) -> None:
    assert is_loopback(host) is ours


@pytest.mark.parametrize(("first", "last"), [(3, 3), (4, 3), (-1, 2)])
def test_a_layer_range_holds_layers(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="first < last"):
        LayerRange(first, last)


def test_a_layer_range_is_half_open() -> None:
    layers = LayerRange(2, 5)
    assert (list(layers), len(layers), 5 in layers, str(layers)) == ([2, 3, 4], 3, False, "2-4")


def test_a_tensor_has_as_many_bytes_as_its_shape_says() -> None:
    with pytest.raises(ValueError, match="takes 12 bytes, found 11"):
        HostTensor(DType.BF16, (2, 3), b"x" * 11)


def stage(index: int, first: int, last: int) -> Stage:
    return Stage(index, LayerRange(first, last), (NodeId(f"n{index}"),), Backend.TORCH, 1, 1, 1, 1)


@pytest.mark.parametrize(
    "stages", [(stage(0, 0, 2), stage(1, 3, 4)), (stage(0, 0, 2), stage(1, 1, 4)), (stage(0, 0, 3),), (stage(1, 0, 4),)]
)
def test_a_plan_owns_every_layer_exactly_once(stages: tuple[Stage, ...]) -> None:
    with pytest.raises(ValueError, match="layers"):
        Plan(layer_count=4, stages=stages, context_tokens=8, users=1, boundary=())


def test_a_lease_keeps_others_out_until_its_holder_falls_silent() -> None:
    lease = Lease().granted(A, 100.0)
    with pytest.raises(NodeRefused, match="serves coordinator"):
        lease.granted(B, 100.0 + LEASE_TTL_S - 0.1)
    assert lease.granted(B, 100.0 + LEASE_TTL_S).holder == B


def test_only_the_holder_commands_and_doing_so_renews_the_lease() -> None:
    lease = Lease().granted(A, 0.0).required(A, LEASE_TTL_S - 1)
    assert lease.holder_at(LEASE_TTL_S + 1) == A
    with pytest.raises(NodeRefused, match="does not hold"):
        lease.required(B, LEASE_TTL_S)


def test_a_released_node_is_free_at_once_and_only_its_holder_releases_it() -> None:
    lease = Lease().granted(A, 0.0)
    assert lease.released(B) == lease
    assert lease.released(A).granted(B, 0.1).holder == B


@pytest.mark.parametrize("stranger", ["", "a" * 31, "A" * 32, "\x1bc" + "a" * 30, "a" * 33])
def test_only_what_can_be_shown_on_a_screen_passes_for_a_coordinator(stranger: str) -> None:
    with pytest.raises(NodeRefused, match="32 hex digits"):
        Lease().granted(CoordinatorId(stranger), 0.0)
