"""Opening mDNS on chosen interfaces, and saying what to do where that fails.

Owns the choice of multicast groups per interface and system. Does not know what is advertised.
"""

from __future__ import annotations

import contextlib
import ipaddress
import platform
import socket
from collections.abc import AsyncIterator, Sequence

from zeroconf import Error as ZeroconfError
from zeroconf.asyncio import AsyncZeroconf

from cluster.errors import NoMulticast
from cluster.interfaces import Interface


@contextlib.asynccontextmanager
async def joined(interfaces: Sequence[Interface]) -> AsyncIterator[AsyncZeroconf]:
    """The same for the length of a block."""
    opened = await open_multicast(interfaces)
    try:
        yield opened
    finally:
        await opened.async_close()


async def open_multicast(interfaces: Sequence[Interface]) -> AsyncZeroconf:
    """Join the mDNS groups on these interfaces."""
    names = ", ".join(interface.name for interface in interfaces) or "no interface at all"
    choice = [group for group in groups_of(interfaces) if _exists(group)]
    opened: AsyncZeroconf | None = None
    try:
        if not choice:
            raise NoMulticast(_no_multicast(names, "none of them has an address that mDNS can use"))
        opened = AsyncZeroconf(interfaces=choice)
        await opened.zeroconf.async_wait_for_start()
    except (ZeroconfError, OSError, RuntimeError) as error:
        if opened is not None:
            await opened.async_close()
        raise NoMulticast(_no_multicast(names, str(error) or type(error).__name__)) from error
    if not opened.zeroconf.engine.senders:
        await opened.async_close()
        raise NoMulticast(_no_multicast(names, "the system refuses multicast on them"))
    return opened


def groups_of(interfaces: Sequence[Interface], system: str = platform.system()) -> list[str | int]:
    """What zeroconf is to join: IPv4 by address, IPv6 by interface number."""
    v4: list[str | int] = [a for i in interfaces for a in i.addresses if ipaddress.ip_address(a).version == 4]
    # macOS refuses IPv4 options on the dual-stack socket that zeroconf would use for both families, and zeroconf
    # would then lose IPv4 without a word. The IPv6 addresses are in the answers all the same.
    if v4 and system == "Darwin":
        return v4
    # zeroconf does not get multicast through ::1.
    v6 = [i.index for i in interfaces if not i.is_loopback and any(":" in address for address in i.addresses)]
    return v4 + list(v6)


def _exists(group: str | int) -> bool:
    """Cards come and go while we run, and zeroconf neither survives a missing one nor closes its sockets then."""
    try:
        if isinstance(group, int):
            socket.if_indextoname(group)
        else:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.bind((group, 0))
    except OSError:
        return False
    return True


def _no_multicast(names: str, reason: str) -> str:
    return (
        f"mDNS cannot start on {names}: {reason}. Name the machines instead: `potluck serve --peer HOST:PORT` or "
        "`potluck join --coordinator HOST:PORT`, with --no-mdns; `potluck doctor` looks for the cause"
    )
