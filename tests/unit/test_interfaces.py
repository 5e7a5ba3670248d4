"""Which interfaces are the LAN's, on tables as Linux and macOS show them."""

from __future__ import annotations

import pytest

from cluster.errors import UsageError
from cluster.interfaces import (
    Interface,
    best_addresses,
    choose_interfaces,
    host_port,
    read_interfaces,
    skip_reason,
)
from cluster.multicast import groups_of

LINUX = (
    Interface("lo", 1, ("127.0.0.1", "::1"), is_loopback=True),
    Interface("eno1", 2, ("192.168.1.20", "fd12:3456::20", "fe80::a00:27ff:fe4e:66a1")),
    Interface("wlp3s0", 3, (), is_up=False),
    Interface("docker0", 4, ("172.17.0.1",)),
    Interface("br-0123456789ab", 5, ("172.18.0.1",)),
    Interface("veth1a2b3c4", 6, ("fe80::1",)),
    Interface("virbr0", 7, ("192.168.122.1",)),
    Interface("tailscale0", 8, ("100.101.102.103",), is_tunnel=True),
    Interface("wg0", 9, ("10.8.0.2",)),
    Interface("br0", 10, ("192.168.2.20",)),
)
MACOS = (
    Interface("lo0", 1, ("127.0.0.1", "::1", "fe80::1"), is_loopback=True),
    Interface("anpi0", 4, ("fe80::10",)),
    Interface("en0", 6, ("fe80::c1c:2ff:fe3d:4e5f", "192.168.1.30")),
    Interface("ap1", 7, ("fe80::11",)),
    Interface("awdl0", 8, ("fe80::12",)),
    Interface("llw0", 9, ("fe80::12",)),
    Interface("bridge0", 10, ("169.254.10.20",)),
    Interface("utun0", 11, ("fe80::13",)),
    Interface("bridge100", 12, ("192.168.64.1",)),
    Interface("vmenet0", 13, ("fe80::14",)),
)


def _names(table: tuple[Interface, ...], host: str = "0.0.0.0") -> list[str]:
    return [interface.name for interface in choose_interfaces(table, host)]


def test_linux_keeps_cards_and_the_lans_own_bridge() -> None:
    assert _names(LINUX) == ["eno1", "br0"]


def test_macos_keeps_the_network_card_and_the_thunderbolt_bridge() -> None:
    assert _names(MACOS) == ["en0", "bridge0"]


@pytest.mark.parametrize("name", ["ppp0", "utun7", "zt5u4u", "tun0", "ipsec0"])
def test_a_tunnel_says_to_name_its_machines(name: str) -> None:
    assert "--peer" in (skip_reason(Interface(name, 3, ("10.0.0.1",))) or "")


def test_an_unknown_point_to_point_link_is_a_tunnel() -> None:
    assert _names((Interface("corp", 3, ("10.0.0.1",), is_tunnel=True),)) == []


def test_loopback_serves_where_there_is_nothing_else() -> None:
    assert _names(LINUX[:1]) == ["lo"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("::1", "::1"), ("127.0.0.7", "127.0.0.7")],
)
def test_loopback_is_taken_when_asked_for(host: str, expected: str) -> None:
    (chosen,) = choose_interfaces(LINUX, host)
    assert (chosen.name, chosen.addresses) == ("lo", (expected,))


def test_an_address_asked_for_is_advertised_alone_whatever_its_interface() -> None:
    (chosen,) = choose_interfaces(LINUX, "100.101.102.103")
    assert (chosen.name, chosen.addresses) == ("tailscale0", ("100.101.102.103",))


@pytest.mark.parametrize("host", ["", "*", "::", "[::]"])
def test_every_spelling_of_the_wildcard_means_the_lan(host: str) -> None:
    assert _names(LINUX, host) == ["eno1", "br0"]


def test_an_address_that_is_not_ours_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        UsageError, match=r"no interface of this machine has the address 10\.9\.9\.9; it has 192\.168\.1\.20"
    ):
        choose_interfaces(LINUX, "10.9.9.9")
    with pytest.raises(UsageError, match="expected an address of this machine"):
        choose_interfaces(LINUX, "mini.local")


def test_addresses_come_most_dependable_first_and_link_local_ones_with_their_scope() -> None:
    chosen = choose_interfaces(MACOS) + choose_interfaces(LINUX) + LINUX[:1]
    assert best_addresses(chosen) == (
        "192.168.1.30", "192.168.1.20", "192.168.2.20", "fd12:3456::20", "169.254.10.20",
        "fe80::c1c:2ff:fe3d:4e5f%en0", "fe80::a00:27ff:fe4e:66a1%eno1", "127.0.0.1", "::1",
    )  # fmt: skip


def test_an_ipv6_address_is_bracketed_before_its_port() -> None:
    assert (host_port("fe80::1%en0", 7433), host_port("10.0.0.1", 7433)) == ("[fe80::1%en0]:7433", "10.0.0.1:7433")


def test_mdns_joins_both_families_but_one_on_macos_and_never_ipv6_loopback() -> None:
    eno1 = LINUX[1]
    assert groups_of([eno1], "Linux") == ["192.168.1.20", 2]
    assert groups_of([eno1], "Darwin") == ["192.168.1.20"]
    assert groups_of([LINUX[5]], "Darwin") == [6]
    assert groups_of([LINUX[0]], "Linux") == ["127.0.0.1"]


def test_this_machines_table_holds_a_loopback_interface_that_is_up() -> None:
    loopback = [interface for interface in read_interfaces() if interface.is_loopback]
    assert loopback and loopback[0].is_up
    assert "127.0.0.1" in loopback[0].addresses
