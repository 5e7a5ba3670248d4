"""Finding nodes on the LAN over mDNS.

Owns the sockets of zeroconf and the life of an advertisement. What it reports is a hint and never the truth:
anyone on the network can forge an advertisement or its withdrawal, and a killed node stays advertised for many
minutes. So a sighting is only a place to dial, and a lost sighting proves nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from zeroconf import DNSQuestionType, ServiceStateChange, Zeroconf
from zeroconf import Error as ZeroconfError
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from cluster.advert import advert_of, read_advert
from cluster.errors import NoMulticast
from cluster.interfaces import Interface, best_addresses, host_port, preference
from cluster.limits import SIGHTING_ADDRESSES_MAX, SIGHTINGS_MAX
from cluster.multicast import joined, open_multicast
from cluster.nodes import NodeFacts
from cluster.types import Backend, HostId, NodeId

SERVICE_TYPE: Final = "_potluck._tcp.local."
_PROBE_TYPE: Final = "_potluck-probe._tcp.local."
_RESOLVE_TIMEOUT_S: Final = 3.0
_RESOLVE_ATTEMPTS: Final = 5
"""A lost answer is asked for again; after 15 s of silence the advertisement is taken for a stale one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeSighting:
    """A node as its advertisement describes it. Nothing in here is proven before the node itself says it."""

    id: NodeId
    name: str
    cluster: str
    addresses: tuple[str, ...]  # HOST:PORT, the most dependable first; IPv6 in brackets, link-local with scope
    backend: Backend
    protocol: int
    version: str
    host: HostId


class Advertiser:
    """One node's advertisement, from `start()` until `stop()` withdraws it."""

    def __init__(self, facts: NodeFacts, port: int, interfaces: Sequence[Interface]) -> None:
        advert = advert_of(facts)
        bare = (address.partition("%")[0] for address in best_addresses(interfaces))
        self._interfaces = interfaces
        self._zeroconf: AsyncZeroconf | None = None
        self._service = AsyncServiceInfo(
            SERVICE_TYPE,
            f"{advert.label()}.{SERVICE_TYPE}",
            port=port,
            properties=advert.txt(),
            # A host name of the node's own: several nodes of one machine may listen on different addresses.
            server=f"potluck-{advert.id}.local.",
            parsed_addresses=list(dict.fromkeys(bare)),
        )

    async def start(self) -> None:
        """Advertise; returns once the announcements are out (about two seconds). NoMulticast where it cannot."""
        opened = await open_multicast(self._interfaces)
        try:
            # The label holds the id's start, so a clash is another node with our id; renamed, both stay visible.
            await (await opened.async_register_service(self._service, allow_name_change=True))
        except BaseException:  # cancelled, too: nobody else knows of its sockets
            await opened.async_close()
            raise
        self._zeroconf = opened

    async def stop(self) -> None:
        """Withdraw at once: browsers drop the node when they hear it."""
        opened, self._zeroconf = self._zeroconf, None
        if opened is not None:
            await opened.async_close()


class Browser:
    """Watches for one cluster's nodes. Callbacks run in the event loop, and again whenever a sighting changes."""

    def __init__(
        self,
        cluster: str,
        on_seen: Callable[[NodeSighting], None],
        on_gone: Callable[[NodeId], None],
        *,
        interfaces: Sequence[Interface],
    ) -> None:
        self._cluster = cluster
        self._on_seen = on_seen
        self._on_gone = on_gone
        self._interfaces = interfaces
        self._accept_loopback = any(interface.is_loopback for interface in interfaces)
        self._seen: dict[str, NodeSighting] = {}  # by the advertisement's name
        self._resolving: dict[str, asyncio.Task[None]] = {}
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None

    async def start(self) -> None:
        """Ask who is there, and listen from now on. NoMulticast where it cannot."""
        self._zeroconf = await open_multicast(self._interfaces)
        # Multicast questions only: a unicast answer reaches just one of the processes that share port 5353 here.
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._changed], question_type=DNSQuestionType.QM
        )

    async def stop(self) -> None:
        """Stop listening. No further callback runs."""
        browser, self._browser = self._browser, None
        if browser is not None:
            await browser.async_cancel()
        tasks = tuple(self._resolving.values())
        self._resolving.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        opened, self._zeroconf = self._zeroconf, None
        if opened is not None:
            await opened.async_close()

    def _changed(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        del service_type  # only one is browsed
        running = self._resolving.pop(name, None)
        if running is not None:
            running.cancel()
        if state_change is ServiceStateChange.Removed:
            self._forget(name)
        elif name in self._seen or len(self._seen) + len(self._resolving) < SIGHTINGS_MAX:
            self._resolving[name] = asyncio.create_task(self._resolve(zeroconf, name))
        else:
            _log.warning("more than %d nodes are advertised on this network; %r is ignored", SIGHTINGS_MAX, name)

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        try:
            info = await _ask(zeroconf, name)
            sighting = None if info is None else self._read(info)
        except (ZeroconfError, ValueError) as error:
            _log.debug("the advertisement %r cannot be read: %s", name, error)
            sighting = None
        del self._resolving[name]
        if sighting is None:
            self._forget(name)
        elif self._seen.get(name) != sighting:
            before = self._seen.get(name)
            if before is not None and before.id != sighting.id:
                self._forget(name)
            self._seen[name] = sighting
            self._on_seen(sighting)

    def _read(self, info: AsyncServiceInfo) -> NodeSighting | None:
        advert = read_advert(info.properties)
        if advert is None or advert.cluster != self._cluster or not info.port:
            return None
        addresses = dialable(info.parsed_scoped_addresses(), info.port, loopback=self._accept_loopback)
        if not addresses:
            return None
        return NodeSighting(
            id=advert.id,
            name=advert.name,
            cluster=advert.cluster,
            addresses=addresses,
            backend=advert.backend,
            protocol=advert.protocol,
            version=advert.version,
            host=advert.host,
        )

    def _forget(self, name: str) -> None:
        gone = self._seen.pop(name, None)
        # A renamed or forged second advertisement must not take the first one's node along.
        if gone is not None and all(other.id != gone.id for other in self._seen.values()):
            self._on_gone(gone.id)


def dialable(addresses: Sequence[str], port: int, *, loopback: bool) -> tuple[str, ...]:
    """The advertised addresses that can be dialled from here, as HOST:PORT, the most dependable first."""
    kept = []
    for address in dict.fromkeys(addresses):
        parsed = ipaddress.ip_address(address)
        scoped = "%" in address
        if parsed.is_unspecified or parsed.is_multicast or (parsed.is_loopback and not loopback):
            continue
        if parsed.version == 6 and parsed.is_link_local and not scoped:
            continue  # heard over IPv4: nothing says on which card it lives
        kept.append(address)
    kept.sort(key=preference)
    return tuple(host_port(address, port) for address in kept[:SIGHTING_ADDRESSES_MAX])


async def multicast_works(interfaces: Sequence[Interface], timeout_s: float = 3.0) -> bool:
    """Whether an advertisement sent on these interfaces is heard on them again by this machine.

    It proves the sockets, the permission and the local firewall; it cannot prove that switches and access points
    carry multicast to other machines.
    """
    name = f"{secrets.token_hex(8)}.{_PROBE_TYPE}"
    addresses = [address.partition("%")[0] for address in best_addresses(interfaces)]
    probe = AsyncServiceInfo(_PROBE_TYPE, name, port=9, properties={}, parsed_addresses=addresses)
    heard = asyncio.Event()

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        del zeroconf, service_type
        if name == probe.name and state_change is not ServiceStateChange.Removed:
            heard.set()

    try:
        async with joined(interfaces) as listening, joined(interfaces) as speaking, asyncio.timeout(timeout_s):
            browser = AsyncServiceBrowser(
                listening.zeroconf, _PROBE_TYPE, handlers=[changed], question_type=DNSQuestionType.QM
            )
            try:
                await speaking.async_register_service(probe, cooperating_responders=True)
                await heard.wait()
            finally:
                await browser.async_cancel()
    except (NoMulticast, TimeoutError):
        return False
    return True


async def _ask(zeroconf: Zeroconf, name: str) -> AsyncServiceInfo | None:
    """Everything about one advertisement; None when nobody answers for it."""
    info = AsyncServiceInfo(SERVICE_TYPE, name)
    for _ in range(_RESOLVE_ATTEMPTS):
        if await info.async_request(zeroconf, _RESOLVE_TIMEOUT_S * 1000, question_type=DNSQuestionType.QM):
            return info
    return None
