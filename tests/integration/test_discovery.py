"""Discovery inside one machine: real zeroconf over loopback, as the demo uses it in a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from zeroconf.asyncio import AsyncServiceInfo

from cluster.discovery import SERVICE_TYPE, Advertiser, Browser, NodeSighting, multicast_works
from cluster.errors import NoMulticast
from cluster.interfaces import Interface, address_towards, choose_interfaces, read_interfaces
from cluster.multicast import joined
from tests.integration.discovery_roles import facts_of

LOOPBACK = choose_interfaces(read_interfaces(), "127.0.0.1")
_WAIT_S = 15.0


@pytest.fixture(scope="module", autouse=True)
def _needs_multicast() -> None:
    if not asyncio.run(multicast_works(LOOPBACK, timeout_s=5.0)):
        pytest.skip("multicast does not work on this machine's loopback interface")


class _Seen:
    """What a browser reported, and a way to wait for it."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeSighting] = {}
        self.reports: list[str] = []
        self._changed = asyncio.Event()

    def seen(self, node: NodeSighting) -> None:
        self.nodes[node.id] = node
        self.reports.append(node.name)
        self._changed.set()

    def gone(self, node_id: str) -> None:
        del self.nodes[node_id]
        self._changed.set()

    def names(self) -> set[str]:
        return {node.name for node in self.nodes.values()}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(_WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def _browsing(cluster: str) -> AsyncIterator[_Seen]:
    seen = _Seen()
    browser = Browser(cluster, seen.seen, seen.gone, interfaces=LOOPBACK)
    await browser.start()
    try:
        yield seen
    finally:
        await browser.stop()


@contextlib.asynccontextmanager
async def _advertised(*nodes: Advertiser) -> AsyncIterator[None]:
    await asyncio.gather(*(node.start() for node in nodes))
    try:
        yield
    finally:
        await asyncio.gather(*(node.stop() for node in nodes))


def _run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def test_a_node_that_was_there_before_the_browser_is_seen() -> None:
    async def test() -> None:
        facts = facts_of("early", "t-early")
        async with _advertised(Advertiser(facts, 7001, LOOPBACK)), _browsing("t-early") as seen:
            await seen.until(lambda: seen.names() == {"early"})
            (node,) = seen.nodes.values()
            assert (node.id, node.host, node.addresses) == (facts.id, facts.host, ("127.0.0.1:7001",))

    _run(test)


def test_a_stopped_node_is_gone_at_once() -> None:
    async def test() -> None:
        leaving = Advertiser(facts_of("leaving", "t-stop"), 7001, LOOPBACK)
        async with _browsing("t-stop") as seen, _advertised(leaving):
            await seen.until(lambda: seen.names() == {"leaving"})
            await leaving.stop()
            async with asyncio.timeout(1.0):
                await seen.until(lambda: not seen.nodes)

    _run(test)


def test_only_the_asked_cluster_is_reported_and_nodes_of_one_name_are_kept_apart() -> None:
    async def test() -> None:
        twin = dataclasses.replace(facts_of("other id", "t-ours"), name="mini")
        nodes = (
            Advertiser(facts_of("mini", "t-ours"), 7001, LOOPBACK),
            Advertiser(twin, 7002, LOOPBACK),
            Advertiser(facts_of("stranger", "t-theirs"), 7003, LOOPBACK),
        )
        async with _browsing("t-theirs") as theirs, _browsing("t-ours") as ours, _advertised(*nodes):
            await ours.until(lambda: len(ours.nodes) == 2)
            await theirs.until(lambda: bool(theirs.nodes))
            assert sorted(node.addresses for node in ours.nodes.values()) == [("127.0.0.1:7001",), ("127.0.0.1:7002",)]
            assert theirs.names() == {"stranger"}

    _run(test)


def test_a_malformed_advertisement_is_ignored_and_the_next_good_one_is_not() -> None:
    async def test() -> None:
        forged = AsyncServiceInfo(
            SERVICE_TYPE, f"forged.{SERVICE_TYPE}", port=1, parsed_addresses=["127.0.0.1"],
            properties={"id": "\x1b[2J", "cluster": "t-forged", "name": "x" * 200},
        )  # fmt: skip
        async with _browsing("t-forged") as seen, joined(LOOPBACK) as forger:
            await (await forger.async_register_service(forged, cooperating_responders=True))
            async with _advertised(Advertiser(facts_of("good", "t-forged"), 7001, LOOPBACK)):
                await seen.until(lambda: bool(seen.nodes))
                assert seen.reports == ["good"]

    _run(test)


def test_where_mdns_cannot_start_the_error_names_the_way_out() -> None:
    async def test() -> None:
        with pytest.raises(NoMulticast, match=r"--peer HOST:PORT.*--coordinator HOST:PORT.*--no-mdns"):
            await Advertiser(facts_of("alone"), 7001, ()).start()

    _run(test)


def test_multicast_does_not_work_on_an_address_that_is_not_ours() -> None:
    foreign = Interface(name="gone0", index=4000, addresses=("198.51.100.7",))
    assert asyncio.run(multicast_works([foreign], timeout_s=2.0)) is False


def test_the_route_to_this_machine_starts_at_this_machine() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
