"""Puts a plan into force: every stage loads its slice, dials the next one, and the pipeline opens.

Knows nodes only through their clients. On any failure nothing is left half open here; the next epoch fences
whatever a node may still hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass

from cluster.addresses import is_loopback, split_host_port
from cluster.errors import LoadFailed, NodeLost, PotluckError
from cluster.interfaces import address_towards, host_port
from cluster.plan import Assignment, Fence, Plan, Stage
from cluster.transport import Credentials
from cluster.types import ModelId, NodeId
from coordinator.happenings import Loading, Tell
from coordinator.narrowing import Narrowing, WireBits
from coordinator.pipeline import Pipeline
from coordinator.roster import Member


@dataclass(frozen=True, slots=True)
class Source:
    """Where the nodes get the model from."""

    model: ModelId
    local_folder: str
    port: int  # of the coordinator's gRPC server
    vocab_size: int
    bits: int | None  # pack full-precision weights while they are loaded


async def install(
    plan: Plan,
    fence: Fence,
    members: Mapping[NodeId, Member],
    source: Source,
    wire_bits: WireBits,
    credentials: Credentials,
    tell: Tell,
) -> Pipeline:
    """Load every stage at once, link them, and open the pipeline. Raises the first node's error."""
    stages = [(stage, _member(members, stage)) for stage in plan.stages]
    await _all(
        [_load(_assignment(plan, stage, fence, member, members, source), member, tell) for stage, member in stages]
    )
    # From the last to the first, so that every stage's successor is there when it dials.
    for position in reversed(range(len(stages))):
        _, member = stages[position]
        following = stages[position + 1][1] if position + 1 < len(stages) else None
        await member.client.connect(fence, dial_address(following, member) if following else "")
    first, last = stages[0][1], stages[-1][1]
    narrowing = Narrowing(wire_bits, plan.boundary, len(stages))
    addresses = first.facts.address, last.facts.address
    return await Pipeline.connect(credentials, fence, *addresses, len(stages) - 1, narrowing)


def _member(members: Mapping[NodeId, Member], stage: Stage) -> Member:
    member = members.get(stage.node)
    if member is None:
        raise NodeLost(f"stage {stage.index}'s node left before it was loaded")
    return member


def _assignment(
    plan: Plan, stage: Stage, fence: Fence, member: Member, members: Mapping[NodeId, Member], source: Source
) -> Assignment:
    return Assignment(
        fence=fence,
        model=source.model,
        stage=stage.index,
        stage_count=len(plan.stages),
        layers=stage.layers,
        layer_count=plan.layer_count,
        boundary=plan.boundary,
        kv_tokens=plan.kv_tokens,
        context_tokens=plan.context_tokens,
        vocab_size=source.vocab_size,
        local_folder=source.local_folder,
        weights_address=host_port(own_address(member), source.port),
        # Also those without a stage: an earlier plan may have left weights on their disks.
        peer_addresses=tuple(dial_address(other, member) for other in members.values() if other is not member),
        bits=source.bits,
    )


async def _load(assignment: Assignment, member: Member, tell: Tell) -> None:
    try:
        async for report in member.client.load(assignment):
            tell(Loading(member.facts.name, report))
    except PotluckError as error:
        raise LoadFailed(f"{member.facts.name}: {error}", node=member.facts.id) from error


def own_address(member: Member) -> str:
    """This machine's address as `member` can dial it."""
    host, _ = split_host_port(member.facts.address)
    if is_loopback(host):
        return host
    return address_towards(host) or host


def dial_address(target: Member, caller: Member) -> str:
    """Where `caller` finds `target`. A node that the coordinator reached over loopback is, for a node on another
    machine, at this machine's own address towards that one."""
    host, port = split_host_port(target.facts.address)
    if is_loopback(host) and not is_loopback(split_host_port(caller.facts.address)[0]):
        return host_port(own_address(caller), port)
    return target.facts.address


async def _all(work: Sequence[Coroutine[None, None, None]]) -> None:
    """Run all together; the first failure cancels the rest and is raised as it is, not in a group."""
    tasks = [asyncio.create_task(item) for item in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
