"""Which nodes this coordinator holds. Hints come from mDNS, `--peer` and announcements; the truth is the live
heartbeat of a node that answered, said who it is, and granted its lease.

Knows nothing of models and plans.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from cluster.errors import NodeRefused, PotluckError
from cluster.limits import HEARTBEAT_LOST_S, SIGHTINGS_MAX
from cluster.nodes import Heartbeat, NodeFacts, told_apart
from cluster.transport import Credentials
from cluster.types import CoordinatorId, NodeId
from coordinator.happenings import NodeJoined, NodeLeft, NodeTurnedAway, Tell
from coordinator.node_client import NodeClient

_log = logging.getLogger(__name__)

_REDIAL_INTERVAL_S = 1.0
"""A machine that was hinted at but did not answer is tried again this often: soon enough for a person who just
started it, and nothing for the network."""


@dataclass(slots=True, eq=False)
class Member:
    """A node under this coordinator's lease."""

    facts: NodeFacts
    client: NodeClient
    joined_s: float
    beat: Heartbeat | None = None


@dataclass(slots=True, eq=False)
class _Hint:
    """Somewhere a node may be."""

    label: str  # names it to people
    addresses: tuple[str, ...]
    expected: NodeId | None  # what the hint says its id is; the node itself decides
    answered: NodeId | None = None
    refused: str = ""
    withdrawn: bool = False
    task: asyncio.Task[None] | None = field(default=None)


class Roster:
    """Dials hints, holds leases, watches heartbeats. `changed` is set whenever membership changes."""

    def __init__(
        self,
        credentials: Credentials,
        coordinator: CoordinatorId,
        cluster: str,
        *,
        exclude: frozenset[str] = frozenset(),
        tell: Tell,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._credentials = credentials
        self._coordinator = coordinator
        self._cluster = cluster
        self._exclude = exclude
        self._tell = tell
        self._now = now
        self._hints: dict[str, _Hint] = {}
        self._members: dict[NodeId, Member] = {}
        self.changed = asyncio.Event()
        self._changed_s = now()

    @property
    def members(self) -> Mapping[NodeId, Member]:
        return self._members

    @property
    def quiet_s(self) -> float:
        """How long ago membership last changed."""
        return self._now() - self._changed_s

    @property
    def turned_away(self) -> Mapping[str, str]:
        """Nodes that were seen but are not used, each with the reason."""
        return {hint.label: hint.refused for hint in self._hints.values() if hint.refused}

    def hint(self, key: str, label: str, addresses: tuple[str, ...], expected: NodeId | None = None) -> None:
        """A node may be at one of `addresses`. A newer hint with the same `key` replaces the addresses."""
        known = self._hints.get(key)
        if known is not None:
            known.addresses, known.expected, known.withdrawn = addresses, expected, False
            return
        if len(self._hints) >= SIGHTINGS_MAX:
            return  # anyone on the network can announce nodes; no pool is this large
        hint = self._hints[key] = _Hint(label, addresses, expected)
        hint.task = asyncio.create_task(self._pursue(key, hint))

    def forget(self, key: str) -> None:
        """The hint was withdrawn. A member stays one for as long as its heartbeat lasts."""
        hint = self._hints.get(key)
        if hint is None:
            return
        hint.withdrawn = True
        if hint.answered not in self._members:
            self._drop(key)

    def _drop(self, key: str) -> None:
        hint = self._hints.pop(key, None)
        if hint is not None and hint.task is not None:
            hint.task.cancel()

    async def _pursue(self, key: str, hint: _Hint) -> None:
        """Dial until the node is a member, watch it until it is lost, and begin again."""
        while True:
            # A node may be hinted at twice, over mDNS and by its own announcement.
            member = None if hint.expected in self._members else await self._admit(hint)
            if member is not None:
                reason = "it is not watched any more"
                try:
                    reason = await self._watch(member)
                finally:  # nobody is a member without being watched
                    self._lose(member, reason)
                    await member.client.close()
            if hint.withdrawn:
                self._drop(key)
            await asyncio.sleep(_REDIAL_INTERVAL_S)

    async def _admit(self, hint: _Hint) -> Member | None:
        for address in hint.addresses:
            client = NodeClient(self._credentials, address, self._coordinator)
            try:
                facts = await client.describe()
                if facts.id in self._members:
                    await client.close()
                    return None
                self._check(facts, hint)
                await client.lease(self._cluster)
            except NodeRefused as refusal:
                await client.close()
                self._turn_away(hint, str(refusal))
                return None
            except PotluckError as error:
                await client.close()
                if hint.expected is None:  # a person named it, and should know
                    self._turn_away(hint, f"{error}; it is tried again every second")
                continue
            facts = told_apart(facts, [member.facts for member in self._members.values()])
            hint.answered, hint.refused = facts.id, ""
            member = self._members[facts.id] = Member(facts, client, self._now())
            self._note_change()
            self._tell(NodeJoined(facts))
            return member
        return None

    def _check(self, facts: NodeFacts, hint: _Hint) -> None:
        if hint.expected is not None and facts.id != hint.expected:
            raise NodeRefused(f"the node there is {facts.name} ({facts.id[:12]}), not {hint.expected[:12]}")
        if facts.name in self._exclude or facts.id in self._exclude:
            raise NodeRefused(f"{facts.name} is excluded by --exclude")

    def _turn_away(self, hint: _Hint, reason: str) -> None:
        if hint.refused != reason:
            self._tell(NodeTurnedAway(hint.label, reason))
        hint.refused = reason

    async def _watch(self, member: Member) -> str:
        """Follow the heartbeats until they end; returns why."""
        try:
            async for beat in member.client.watch(HEARTBEAT_LOST_S):
                member.beat = beat
                member.facts = replace(member.facts, memory=beat.memory)
                if beat.problem:
                    self._note_change()
        except PotluckError as error:
            return str(error)
        return "its heartbeats ended"

    def _lose(self, member: Member, reason: str) -> None:
        if self._members.get(member.facts.id) is member:
            del self._members[member.facts.id]
            self._note_change()
            self._tell(NodeLeft(member.facts.name, reason))

    async def unload_all(self) -> None:
        """Free every member's stage: what nodes of one host hold of a broken plan is missing from the next."""
        await asyncio.gather(*(self._unload(member) for member in self._members.values()))

    async def _unload(self, member: Member) -> None:
        try:
            await member.client.unload()
        except PotluckError as error:
            _log.debug("%s was not unloaded: %s", member.facts.name, error)

    def _note_change(self) -> None:
        self._changed_s = self._now()
        self.changed.set()

    async def close(self) -> None:
        """Stop dialling and give every node back."""
        members = tuple(self._members.values())
        self._members.clear()  # before their watches end: this is no loss to tell of
        tasks = [hint.task for hint in self._hints.values() if hint.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._give_back(member) for member in members))

    async def _give_back(self, member: Member) -> None:
        """Release the node, so that another coordinator need not wait for the lease to run out."""
        client = NodeClient(self._credentials, member.facts.address, self._coordinator)  # the watch has closed its own
        try:
            await client.release()
        except PotluckError as error:
            _log.debug("%s was not released: %s", member.facts.name, error)
        finally:
            await client.close()
