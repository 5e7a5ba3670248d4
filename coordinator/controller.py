"""The coordinator's life with an open model: gather nodes, plan, install, serve; and again when a plan breaks.

Wires the parts together and owns their order. Decisions live in `gathering`, `placement` and `scheduler`;
this file only carries them out.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.errors import LoadFailed, NodeLost, PotluckError
from cluster.limits import FIRST_STEP_TIMEOUT_S
from cluster.nodes import NodeFacts
from cluster.placement import Ask, sequences_max
from cluster.plan import Fence, Plan
from cluster.transport import Credentials
from cluster.types import DeploymentId, Epoch, HostId, NodeId
from coordinator.admission import Room
from coordinator.gathering import Broken, Wait, decide
from coordinator.happenings import Interrupted, Planned, Ready, Tell, Waiting
from coordinator.install import Source, install
from coordinator.narrowing import WireBits
from coordinator.opening import OpenModel
from coordinator.roster import Roster
from coordinator.service import InferenceService
from coordinator.serving import Serving


@dataclass(frozen=True, slots=True)
class Wish:
    """What the person who started the coordinator asked for."""

    ask: Ask
    min_nodes: int
    host: HostId  # of the coordinator's machine: a node there makes the best first stage
    prefix_cache: bool = True
    wire_bits: WireBits = WireBits.AS_COMPUTED


class Controller:
    """Runs until it is cancelled."""

    def __init__(
        self,
        model: OpenModel,
        wish: Wish,
        roster: Roster,
        service: InferenceService,
        credentials: Credentials,
        port: int,
        tell: Tell,
    ) -> None:
        self._model = model
        self._wish = wish
        self._roster = roster
        self._service = service
        self._credentials = credentials
        self._port = port
        self._tell = tell
        self._deployment = DeploymentId(secrets.token_hex(8))
        self._epoch = 0
        self.plan: Plan | None = None
        self.serving: Serving | None = None
        self._unable: dict[NodeId, float] = {}  # with the moment it had joined: who comes back has another chance
        self._ready_s: float | None = None  # when the plan in force brought its first token

    async def run(self) -> None:
        minding = asyncio.create_task(self._service.mind_waiting())
        try:
            await self._serve_plans()
        finally:
            minding.cancel()
            await asyncio.gather(minding, return_exceptions=True)

    async def _serve_plans(self) -> None:
        """One after the other, for ever."""
        broken = Broken(served=False)
        while True:
            plan = await self._gather()
            self._ready_s = None
            try:
                await self._serve(plan)
            except PotluckError as error:
                self._note_unable(error)
                # Whatever broke this plan, the next one is made from the nodes that are left.
                self._tell(Interrupted(str(error)))
                self._service.set_phase("planning", f"the last plan broke: {error}")
            finally:
                self.plan = self.serving = None
            await self._roster.unload_all()
            broken = broken.next(self._served_s())
            # Without one of its nodes the next plan is another one, or there is something to wait for and to say.
            if all(stage.node in self._roster.members for stage in plan.stages):
                await self._until_changed(broken.pause_s)

    def _note_unable(self, error: PotluckError) -> None:
        """A node that could not load its slice is left out of the next plan, if there is one without it."""
        member = self._roster.members.get(error.node) if isinstance(error, LoadFailed) else None
        if member is not None:
            self._unable[member.facts.id] = member.joined_s

    def _served_s(self) -> float | None:
        return None if self._ready_s is None else time.monotonic() - self._ready_s

    async def _gather(self) -> Plan:
        """Wait until the nodes that are here can hold the model."""
        told = ""
        while True:
            self._roster.changed.clear()
            members = self._roster.members.values()
            able = [member.facts for member in members if self._unable.get(member.facts.id) != member.joined_s]
            decision = await self._decide(able)
            if len(able) < len(members) and not isinstance(decision, Plan):
                # Without those that could not load their slice there is no plan, so they get another chance.
                self._unable.clear()
                decision = await self._decide([member.facts for member in members])
            if isinstance(decision, Plan):
                return decision
            self._service.set_phase("waiting for nodes", decision.reason)
            if decision.reason != told:
                self._tell(Waiting(decision.reason))
                told = decision.reason
            await self._until_changed(decision.again_s)

    async def _decide(self, nodes: Sequence[NodeFacts]) -> Plan | Wait:
        # In a thread: working out what would fit instead can take a second on awkward pools.
        return await asyncio.to_thread(
            decide,
            self._model.facts,
            nodes,
            self._ask(nodes),
            min_nodes=self._wish.min_nodes,
            # Who waits for an answer is better served at once than by machines that may come in a moment.
            quiet_s=math.inf if self._service.waits_for_plan else self._roster.quiet_s,
        )

    def _ask(self, nodes: Sequence[NodeFacts]) -> Ask:
        """The coordinator sits beside stage 0 whenever one node shares its machine."""
        here = [node.id for node in nodes if node.host == self._wish.host]
        return replace(self._wish.ask, first=here[0]) if len(here) == 1 else self._wish.ask

    async def _until_changed(self, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._roster.changed.wait()
        except TimeoutError:
            return

    async def _serve(self, plan: Plan) -> None:
        """Install `plan` and serve until it breaks, which raises."""
        self._epoch += 1
        fence = Fence(self._deployment, Epoch(self._epoch))
        self.plan = plan
        nodes = tuple(member.facts for member in self._roster.members.values())
        self._tell(Planned(plan, self._model.facts, nodes))
        self._service.set_phase("loading", "the model is being loaded")
        facts = self._model.facts
        folder = str(self._model.resolved.folder.resolve())
        source = Source(self._model.manifest.id, folder, self._port, facts.vocab_size, facts.bits)
        members, wire_bits = self._roster.members, self._wish.wire_bits
        pipeline = await install(plan, fence, members, source, wire_bits, self._credentials, self._tell)
        sequences = sequences_max(facts, plan.context_tokens, plan.users)
        room = Room(len(plan.stages), plan.kv_tokens, plan.context_tokens, sequences, facts.rewind)
        serving = Serving(pipeline, room, prefix_cache=self._wish.prefix_cache)
        self.serving = serving
        self._service.begin(serving)
        work = (serving.run(), self._until_lost(plan), self._prove())
        tasks = [asyncio.create_task(item) for item in work]
        try:
            # The proof ends well by going on for ever, so whatever ends first is a failure.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except PotluckError as error:
            await _end(tasks)
            self._service.park(serving, str(error))
            raise
        finally:
            await _end(tasks)
            serving.end("the coordinator is stopping")

    async def _prove(self) -> None:
        """The first real token makes the plan ready; from then on there is nothing more to prove."""
        took_s = await self._service.prove(FIRST_STEP_TIMEOUT_S)
        self._ready_s = time.monotonic()
        self._tell(Ready(took_s))
        await asyncio.Event().wait()

    async def _until_lost(self, plan: Plan) -> None:
        """Raises as soon as a node of the plan is gone or says that it cannot go on."""
        fence = Fence(self._deployment, Epoch(self._epoch))
        while True:
            self._roster.changed.clear()
            for stage in plan.stages:
                member = self._roster.members.get(stage.node)
                if member is None:
                    raise NodeLost(f"stage {stage.index}'s node is gone")
                beat = member.beat
                # The latest beat may still tell of the stage that this plan has replaced.
                if beat is not None and beat.problem and beat.fence == fence:
                    raise NodeLost(f"{member.facts.name}: {beat.problem}")
            await self._roster.changed.wait()


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
