"""Which network interfaces reach the other machines, and the addresses that we can be found at.

Owns the choice: real network cards yes, containers' bridges, virtual machines and tunnels no. Choosing is pure,
over a table; reading the table and asking the kernel for a route are at the bottom. Knows nothing of mDNS.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import psutil

from cluster.errors import UsageError

_CONTAINERS: Final = "a network of containers on this machine"
_VIRTUAL: Final = "a network of virtual machines on this machine"
_TUNNEL: Final = "a tunnel: it carries no multicast; name the machines behind it with --peer or --coordinator"
_APPLE: Final = "Apple's own radio link, not the LAN"

_SKIPPED_NAMES: Final = (
    (re.compile(r"docker\d*|docker_gwbridge|br-[0-9a-f]{12}|veth.*|cni.*|flannel.*|cali.*|podman\d*|lxc.*|lxdbr\d*"),
     _CONTAINERS),
    # macOS numbers the bridges of its virtual machines from 100; bridge0 is Thunderbolt, often the fastest link.
    (re.compile(r"virbr.*|vmnet.*|vmenet.*|vboxnet.*|vnet\d+|tap\d+|bridge1\d\d"), _VIRTUAL),
    (re.compile(r"utun\d*|tun\d*|wg.*|tailscale\d*|zt.*|ppp\d*|ipsec\d*|gif\d*|stf\d*|sit\d*|nordlynx"), _TUNNEL),
    (re.compile(r"awdl\d*|llw\d*|anpi\d*|ap\d+"), _APPLE),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Interface:
    """One network interface. Addresses are bare: an IPv6 link-local one carries no scope here."""

    name: str
    index: int
    addresses: tuple[str, ...]
    is_up: bool = True
    is_loopback: bool = False
    is_tunnel: bool = False  # point to point


def skip_reason(interface: Interface) -> str | None:
    """Why other machines on the LAN are not found through this interface; None when they are."""
    if not interface.is_up:
        return "down"
    if not interface.addresses:
        return "it has no address"
    if interface.is_loopback:
        return "it never leaves this machine"
    for pattern, reason in _SKIPPED_NAMES:
        if pattern.fullmatch(interface.name):
            return reason
    return _TUNNEL if interface.is_tunnel else None


def choose_interfaces(table: Sequence[Interface], host: str = "0.0.0.0") -> tuple[Interface, ...]:
    """The interfaces to advertise on and browse through, for a server that listens on `host`.

    A wildcard means the LAN's interfaces, or loopback where there are none (a sandbox, a plane). A particular
    address means the interface that holds it, whatever its kind: someone asked for it.
    """
    wanted = _parse_host(host)
    if wanted is not None and not wanted.is_unspecified:
        return _holding(table, wanted)
    lan = tuple(interface for interface in table if skip_reason(interface) is None)
    return lan or tuple(interface for interface in table if interface.is_loopback and interface.is_up)


def best_addresses(interfaces: Sequence[Interface]) -> tuple[str, ...]:
    """Addresses that others may dial, the most dependable first; IPv6 link-local ones carry our scope, `%name`."""
    found = [(preference(address), f"{address}%{interface.name}" if _is_link_local6(address) else address)
             for interface in interfaces for address in interface.addresses]  # fmt: skip
    return tuple(dict.fromkeys(address for _, address in sorted(found, key=lambda pair: pair[0])))


def preference(address: str) -> int:
    """Sorts addresses: IPv4 first, since every LAN routes it; then IPv6; then link-local, which needs a scope;
    loopback last, since it reaches only us."""
    parsed = ipaddress.ip_address(address)
    if parsed.is_loopback:
        return 4
    if parsed.is_link_local:
        return 3 if parsed.version == 6 else 2
    return 1 if parsed.version == 6 else 0


def host_port(host: str, port: int) -> str:
    """An address as gRPC and people write it: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_interfaces() -> tuple[Interface, ...]:
    """This machine's table."""
    indexes = {name: index for index, name in socket.if_nameindex()}
    stats = psutil.net_if_stats()
    table = []
    for name, entries in psutil.net_if_addrs().items():
        flags = frozenset(stats[name].flags.split(",")) if name in stats else frozenset()
        bare = (e.address.partition("%")[0] for e in entries if e.family in (socket.AF_INET, socket.AF_INET6))
        table.append(
            Interface(
                name=name,
                index=indexes.get(name, 0),
                addresses=tuple(dict.fromkeys(bare)),
                is_up=name in stats and stats[name].isup,
                is_loopback="loopback" in flags or re.fullmatch(r"lo\d*", name) is not None,
                is_tunnel=bool(flags & {"pointopoint", "pointtopoint"}),
            )
        )
    return tuple(table)


def address_towards(peer_host: str) -> str | None:
    """Our address on the route to a peer, as the kernel would choose it; None when there is no route.

    Connecting a UDP socket sends nothing: it only makes the kernel look the route up.
    """
    try:
        family, kind, protocol, _, peer = socket.getaddrinfo(peer_host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(peer)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _parse_host(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a server listens on; None for the wildcard in any of its spellings."""
    bare = host.strip("[]").partition("%")[0]
    if bare in ("", "*"):
        return None
    if bare == "localhost":
        return ipaddress.IPv4Address("127.0.0.1")
    try:
        return ipaddress.ip_address(bare)
    except ValueError as error:
        raise UsageError(f"expected an address of this machine such as 192.168.1.20, found {host!r}") from error


def _holding(
    table: Sequence[Interface], wanted: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> tuple[Interface, ...]:
    """The interface with this address, and of its addresses only this one: the server hears no other."""
    for interface in table:
        if wanted.is_loopback and not interface.is_loopback:
            continue
        held = {ipaddress.ip_address(address) for address in interface.addresses}
        # Every 127.x.y.z reaches this machine, though only 127.0.0.1 is listed.
        if wanted in held or (wanted.is_loopback and wanted.version == 4 and held):
            return (replace(interface, addresses=(str(wanted),)),)
    known = ", ".join(best_addresses([interface for interface in table if interface.is_up])) or "none"
    raise UsageError(f"no interface of this machine has the address {wanted}; it has {known}")


def _is_link_local6(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.version == 6 and parsed.is_link_local
