"""The life of a node process: identity, measurements, a gRPC server, its advertisement; until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import __version__
from cluster.advert import check_name
from cluster.discovery import Advertiser
from cluster.errors import NoMulticast
from cluster.identity import host_id, load_or_create_identity
from cluster.interfaces import best_addresses, choose_interfaces, host_port, read_interfaces
from cluster.limits import PROTOCOL_VERSION
from cluster.models.formats import readable_formats
from cluster.nodes import MemoryReport, NodeFacts
from cluster.state_dir import StateDir
from cluster.transport import Credentials, create_server, data_service
from cluster.wire.node_pb2_grpc import add_NodeServicer_to_server, add_WeightsServicer_to_server
from node.announcing import announce_forever
from node.happenings import TellNode
from node.hardware import Device, engine_version, measure_memory
from node.loading import EngineChoice, StageLoader
from node.service import NodeService, NodeSetup
from node.weights.sharing import share
from node.weights.shelf import Shelf

_log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread may keep the interpreter while the streams want it. With Python's 5 ms a result waited
3 ms to be sent beside an engine that is busy in Python, with this 1 ms."""

_STOP_S = 5.0
"""Whoever stops a node waits at most this long for its engine."""


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What `potluck join` was told, checked."""

    name: str
    cluster: str
    device: Device
    memory_cap_bytes: int | None
    reserve_fraction: float | None
    threads: int | None
    host: str  # the address to listen on; empty for every interface
    port: int
    coordinators: tuple[str, ...]  # HOST:PORT to announce to
    mdns: bool
    state: Path
    weights_bytes_max: int | None = None  # on this node's disk; None for a share of the disk


@dataclass(frozen=True, slots=True)
class NodeUp:
    """The node can be reached."""

    facts: NodeFacts
    addresses: tuple[str, ...]
    mdns_problem: str  # why it is not advertised; empty when it is, or was not asked to be


async def run_node(options: NodeOptions, on_up: Callable[[NodeUp], None], tell: TellNode, stop: asyncio.Event) -> None:
    """Serve until `stop` is set. Raises UsageError for options that cannot work here."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with StateDir(options.state) as state:
        facts = _facts(options, state)
        credentials = Credentials()
        shelf = Shelf(options.state, options.weights_bytes_max)
        loader = StageLoader(
            EngineChoice(options.device.backend, options.device.device, options.threads), shelf, credentials
        )
        await loader.prepare()
        service = NodeService(NodeSetup(facts, lambda: _measure(options), credentials), loader, tell=tell)
        server = create_server()
        weights = share(shelf)
        add_NodeServicer_to_server(service, server)
        add_WeightsServicer_to_server(weights, server)
        server.add_generic_rpc_handlers((data_service(service.serve_stream),))
        port = credentials.bind(server, host_port(options.host or "::", options.port))
        await server.start()
        interfaces = choose_interfaces(read_interfaces(), options.host or "0.0.0.0")
        addresses = tuple(host_port(address, port) for address in best_addresses(interfaces))
        facts = replace(facts, address=addresses[0] if addresses else host_port("127.0.0.1", port))
        advertiser = Advertiser(facts, port, interfaces) if options.mdns else None
        problem = await _advertise(advertiser)
        announcing = [
            asyncio.create_task(announce_forever(credentials, address, facts, port, options.host))
            for address in options.coordinators
        ]
        background = [*announcing, asyncio.create_task(service.mind_lease())]
        on_up(NodeUp(facts, addresses, problem))
        try:
            await stop.wait()
        finally:
            service.begin_to_stop()
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            if advertiser is not None:
                await advertiser.stop()
            await server.stop(grace=0.5)
            await _close_engine(service, loader)
            weights.close()
            loader.close()


async def _close_engine(service: NodeService, loader: StageLoader) -> None:
    try:
        async with asyncio.timeout(_STOP_S):
            await service.close()
            await loader.settle()
    except TimeoutError:
        # A load or a kernel cannot be interrupted, and the interpreter would wait for its thread.
        _log.warning("the engine is still busy after %.0f s; this process leaves without it", _STOP_S)
        os._exit(1)


async def _advertise(advertiser: Advertiser | None) -> str:
    if advertiser is None:
        return ""
    try:
        await advertiser.start()
    except NoMulticast as error:
        # The node can still be reached at its address; whoever started it is told how.
        return str(error)
    return ""


def _facts(options: NodeOptions, state: StateDir) -> NodeFacts:
    return NodeFacts(
        id=load_or_create_identity(state).id,
        name=check_name(options.name, "--name"),
        cluster=check_name(options.cluster, "--cluster"),
        host=host_id(state),
        address="",
        backend=options.device.backend,
        device=options.device.device,
        memory=_measure(options),
        protocol=PROTOCOL_VERSION,
        version=__version__,
        formats=readable_formats(options.device.backend, options.device.device),
        engine_version=engine_version(options.device.backend),
    )


def _measure(options: NodeOptions) -> MemoryReport:
    return measure_memory(
        options.device,
        memory_cap_bytes=options.memory_cap_bytes,
        reserve_fraction=options.reserve_fraction,
    )
