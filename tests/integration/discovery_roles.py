"""A node that only advertises and a coordinator that only browses, as processes for the discovery tests.

    python -m tests.integration.discovery_roles advertise NAME CLUSTER PORT
    python -m tests.integration.discovery_roles browse CLUSTER

Both run until SIGTERM and print one JSON object a line, with the machine-wide monotonic clock.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import sys
import time

from cluster.discovery import Advertiser, Browser
from cluster.interfaces import choose_interfaces, read_interfaces
from cluster.nodes import MemoryReport, NodeFacts, Pressure
from cluster.types import Backend, HostId, NodeId


def facts_of(name: str, cluster: str = "default") -> NodeFacts:
    """A node's facts, with an id made from its name."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return NodeFacts(
        id=NodeId(digest[:32]),
        name=name,
        cluster=cluster,
        host=HostId(digest[32:]),
        address="",
        backend=Backend.TORCH,
        device="cpu",
        memory=MemoryReport(0, 0, 0, 0, Pressure.NORMAL, ""),
        protocol=1,
        version="0.1.0",
        engine_version="",
        formats=frozenset(),
    )


def _say(**fields: object) -> None:
    sys.stdout.write(json.dumps({"at_s": time.monotonic(), **fields}) + "\n")
    sys.stdout.flush()


async def main(role: str, *arguments: str) -> None:
    """Play the role until SIGTERM."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    interfaces = choose_interfaces(read_interfaces())
    part: Advertiser | Browser
    if role == "advertise":
        name, cluster, port = arguments
        part = Advertiser(facts_of(name, cluster), int(port), interfaces)
    else:
        part = Browser(
            arguments[0],
            lambda node: _say(event="seen", name=node.name, id=node.id, addresses=node.addresses),
            lambda node_id: _say(event="gone", id=node_id),
            interfaces=interfaces,
        )
    await part.start()
    _say(event="started")
    await stopped.wait()
    await part.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
