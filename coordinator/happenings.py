"""What the coordinator tells whoever watches it: the command line, a log, a test. Values only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.models.facts import ModelFacts
from cluster.nodes import LoadReport, NodeFacts
from cluster.plan import Plan
from cluster.types import CoordinatorId


@dataclass(frozen=True, slots=True)
class Starting:
    """The HTTP endpoint has its address; it answers from now on."""

    url: str


@dataclass(frozen=True, slots=True)
class Working:
    """A long piece of work at the coordinator itself, such as hashing the model once."""

    what: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ModelOpened:
    name: str
    facts: ModelFacts


@dataclass(frozen=True, slots=True)
class Listening:
    """The coordinator can be joined."""

    coordinator: CoordinatorId  # commands the nodes that it holds, so it is shown to nobody but its owner
    cluster: str
    port: int
    addresses: tuple[str, ...]  # HOST:PORT for `join --coordinator`
    mdns_problem: str  # why nodes cannot be discovered; empty when they can


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is missing before a plan can be made, and what to do about it."""

    reason: str


@dataclass(frozen=True, slots=True)
class NodeJoined:
    facts: NodeFacts


@dataclass(frozen=True, slots=True)
class NodeLeft:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class NodeTurnedAway:
    """A node that was seen but is not used."""

    who: str
    reason: str


@dataclass(frozen=True, slots=True)
class Planned:
    plan: Plan
    facts: ModelFacts
    nodes: tuple[NodeFacts, ...]


@dataclass(frozen=True, slots=True)
class Loading:
    node: str
    report: LoadReport


@dataclass(frozen=True, slots=True)
class Ready:
    """A real token came out."""

    first_token_s: float


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The plan cannot serve any more; the coordinator goes back to planning."""

    reason: str


Happening = (
    Starting
    | Working
    | ModelOpened
    | Listening
    | Waiting
    | NodeJoined
    | NodeLeft
    | NodeTurnedAway
    | Planned
    | Loading
    | Ready
    | Interrupted
)

Tell = Callable[[Happening], None]
