"""`potluck plan`: where a model would go on the machines that are here, without loading anything."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cluster import __version__
from cluster.addresses import split_host_port
from cluster.cli.display import plan_lines
from cluster.cli.running import run_async
from cluster.cli.serve import parse_context
from cluster.discovery import Browser, NodeSighting
from cluster.errors import NoMulticast, PotluckError, UsageError
from cluster.identity import host_id, load_or_create_identity
from cluster.interfaces import choose_interfaces, read_interfaces
from cluster.limits import PROTOCOL_VERSION
from cluster.models.facts import ModelFacts, read_facts
from cluster.models.formats import readable_formats
from cluster.models.quantising import check_bits
from cluster.nodes import NodeFacts, told_apart
from cluster.placement import Ask, RoughFit, describe, place, rough_fits
from cluster.plan import Plan
from cluster.quantities import format_bytes
from cluster.state_dir import StateDir, default_state_path
from cluster.transport import Credentials
from cluster.types import CoordinatorId, NodeId
from coordinator.hub import peek_model
from coordinator.node_client import NodeClient
from node.hardware import detect_devices, engine_version, measure_memory


@dataclass(frozen=True, slots=True)
class PlanCommand:
    """The options as typed."""

    model: str | None
    cluster: str
    min_nodes: int
    context: str
    users: int
    bits: int | None
    peers: tuple[str, ...]
    mdns: bool
    local_node: bool
    wait_s: float
    state: Path | None
    as_json: bool


def plan_command(command: PlanCommand) -> int:
    ask = Ask(parse_context(command.context), command.users, max(1, command.min_nodes))
    bits = check_bits(command.bits)
    for peer in command.peers:
        split_host_port(peer)
    found: list[NodeFacts] = []
    run_async(_look(command, found))
    nodes = [*found, *_this_machine(command, found)]
    if not nodes:
        raise PotluckError("no node answered; start one with `potluck join`, or leave --no-local-node out")
    console = Console(highlight=False, soft_wrap=True)
    if command.model is None:
        _show_pool(command, console, nodes)
        return 0
    facts = read_facts(peek_model(command.model), bits)
    plan = place(facts, nodes, ask)
    if command.as_json:
        sys.stdout.write(json.dumps(_plan_document(plan, facts, nodes)) + "\n")
        return 0
    size = f"{format_bytes(facts.stored_bytes)} in {facts.format}"
    console.print(f"{facts.architecture}, {facts.layer_count} layers, {size}", markup=False)
    for line in plan_lines(plan, facts, tuple(nodes)):
        console.print(line, markup=False)
    return 0


async def _look(command: PlanCommand, found: list[NodeFacts]) -> None:
    """Ask every node that shows up within the time who it is. Leased ones answer too; nothing changes there."""
    sightings: dict[NodeId, NodeSighting] = {}
    if command.mdns:
        browser = Browser(
            command.cluster,
            lambda sighting: sightings.update({sighting.id: sighting}),
            lambda node: None,
            interfaces=choose_interfaces(read_interfaces()),
        )
        try:
            await browser.start()
        except NoMulticast as error:
            Console(stderr=True, soft_wrap=True).print(f"! {error}", markup=False)
        else:
            await asyncio.sleep(command.wait_s)
            await browser.stop()
    places = [*((peer,) for peer in command.peers), *(sighting.addresses for sighting in sightings.values())]
    answers = await asyncio.gather(*(_describe(addresses) for addresses in places))
    known: set[NodeId] = set()
    for facts in answers:
        if facts is not None and facts.id not in known:
            known.add(facts.id)
            found.append(told_apart(facts, found))


async def _describe(addresses: Sequence[str]) -> NodeFacts | None:
    for address in addresses:
        client = NodeClient(Credentials(), address, CoordinatorId("plan"))
        try:
            return await client.describe()
        except PotluckError as error:
            Console(stderr=True, soft_wrap=True).print(f"! {error}", markup=False)
        finally:
            await client.close()
    return None


def _this_machine(command: PlanCommand, others: Sequence[NodeFacts]) -> list[NodeFacts]:
    """What a node here would offer; nothing where one is running already, or no engine is installed."""
    if not command.local_node:
        return []
    root = command.state or default_state_path()
    with StateDir(root / "plan") as state:
        host = host_id(state)
        identity = load_or_create_identity(state)
    if any(node.host == host for node in others):
        return []
    try:
        device = detect_devices()[0]
    except UsageError:
        return []
    return [
        NodeFacts(
            id=identity.id,
            name="this machine",
            cluster=command.cluster,
            host=host,
            address="",
            backend=device.backend,
            device=device.device,
            memory=measure_memory(device),
            protocol=PROTOCOL_VERSION,
            version=__version__,
            formats=readable_formats(device.backend, device.device),
            engine_version=engine_version(device.backend),
        )
    ]


def _show_pool(command: PlanCommand, console: Console, nodes: Sequence[NodeFacts]) -> None:
    fits = rough_fits(nodes, users=command.users)
    if command.as_json:
        document = {
            "nodes": [_node_document(node) for node in nodes],
            "fits": [
                {"billions": fit.billions, "bits": fit.bits, "needed_bytes": fit.needed_bytes, "fits": fit.fits}
                for fit in fits
            ],
        }
        sys.stdout.write(json.dumps(document) + "\n")
        return
    console.print(f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}:", markup=False)
    for node in nodes:
        memory = node.memory
        console.print(f"  {node.name} ({node.backend.value} on {node.device}): may use "
                      f"{format_bytes(memory.budget_bytes)}; {memory.explained}", markup=False)  # fmt: skip
    console.print(f"Usual model sizes, roughly, for {command.users} at once with 8,192 tokens each:", markup=False)
    for billions in dict.fromkeys(fit.billions for fit in fits):
        cells = [f"{fit.bits} bits {_verdict(fit)}" for fit in fits if fit.billions == billions]
        console.print(f"  {billions:>4} B: {'  '.join(cells)}".rstrip(), markup=False)


def _verdict(fit: RoughFit) -> str:
    """A pool has nothing to offer where none of its nodes reads the format."""
    size = format_bytes(fit.needed_bytes)
    if not fit.readers:
        return f"{f'{size}, no node reads it':<27}"
    return f"{f'{size} fits' if fit.fits else f'{size}, too large':<27}"


def _plan_document(plan: Plan, facts: ModelFacts, nodes: Sequence[NodeFacts]) -> dict[str, object]:
    return {
        "context_tokens": plan.context_tokens,
        "users": plan.users,
        "stages": [
            {
                "node": row.name,
                "backend": row.backend.value,
                "first_layer": row.layers.first,
                "last_layer": row.layers.last,
                "weight_bytes": row.weight_bytes,
                "kv_bytes": row.kv_bytes,
                "workspace_bytes": row.workspace_bytes,
                "budget_bytes": row.budget_bytes,
                "reserve_bytes": row.reserve_bytes,
                "total_bytes": row.total_bytes,
            }
            for row in describe(plan, facts, nodes)
        ],
        "format": facts.format,
        "left_out": [{"node": node, "reason": reason} for node, reason in plan.left_out],
        "nodes": [_node_document(node) for node in nodes],
    }


def _node_document(node: NodeFacts) -> dict[str, object]:
    return {
        "id": node.id,
        "name": node.name,
        "address": node.address,
        "backend": node.backend.value,
        "device": node.device,
        "budget_bytes": node.memory.budget_bytes,
        "reserve_bytes": node.memory.reserve_bytes,
        "total_bytes": node.memory.total_bytes,
        "explained": node.memory.explained,
    }
