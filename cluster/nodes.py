"""What a node says about itself: who it is, what it runs, what memory it may use.

Values only; measuring is `node.hardware`, carrying is `cluster.wire`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.plan import Fence
from cluster.types import CPU, Backend, Format, HostId, NodeId


class Pressure(enum.StrEnum):
    """How close the device is to running out."""

    NORMAL = "normal"
    HIGH = "high"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """A control group that limits a node, and what all nodes within it may hold together."""

    id: str  # the same for all nodes of a host that are in it, whatever they call it
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Memory is a budget, not free RAM: what the plan may use, and what is used of it."""

    budget_bytes: int  # what this node may hold: weights, KV and workspace together
    host_budget_bytes: int  # what all nodes of this host may hold together (the same on each of them)
    used_bytes: int
    total_bytes: int
    pressure: Pressure
    explained: str  # one line a person can check: "24.0 GiB RAM, 20.1 GiB available, 15 % kept back"
    reserve_bytes: int = 0  # kept back on purpose: for the system, its person, an engine's own needs, or by `--memory`
    groups: tuple[GroupMemory, ...] = ()  # that limit this node, the outermost first


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Everything that placement and the status page need to know of a node."""

    id: NodeId
    name: str
    cluster: str
    host: HostId
    address: str  # HOST:PORT of its gRPC server, as its coordinator reached it
    backend: Backend
    device: str  # cpu, cuda:0, mps, metal
    memory: MemoryReport
    protocol: int  # the wire contract's version
    version: str  # potluck's version
    engine_version: str  # such as "torch 2.13.0, transformers 5.23.0"
    formats: frozenset[Format]  # how weights may be stored for its engine to read them

    @property
    def on_cpu(self) -> bool:
        """Whether a processor computes, which takes other memory beside weights than a GPU."""
        return self.device == CPU


def told_apart(facts: NodeFacts, others: Iterable[NodeFacts]) -> NodeFacts:
    """The node under a name that none of `others` has: machines are often called alike."""
    taken = any(other.name == facts.name and other.id != facts.id for other in others)
    return replace(facts, name=f"{facts.name}-{facts.id[:4]}") if taken else facts


class LoadPhase(enum.StrEnum):
    """What a node that prepares a stage is doing."""

    FETCHING = "fetching"  # bytes over the network
    LOADING = "loading"  # bytes from disk into the engine
    READY = "ready"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How far a node's load has come."""

    phase: LoadPhase
    done_bytes: int = 0
    total_bytes: int = 0
    received_bytes: int = 0  # over the network so far
    rate_bytes_s: float = 0.0

    @property
    def left_s(self) -> float | None:
        """Estimated time left in this phase, once a rate is known."""
        return (self.total_bytes - self.done_bytes) / self.rate_bytes_s if self.rate_bytes_s > 0 else None


class NodePhase(enum.StrEnum):
    """Where a node is in its life under a coordinator."""

    IDLE = "idle"
    LOADING = "loading"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a leased node says several times a second."""

    fence: Fence | None  # of the installed stage
    phase: NodePhase
    steps_done: int  # a stuck interpreter keeps answering pings, but this stops
    steps_queued: int
    memory: MemoryReport
    kv_tokens_used: int
    sequences: int
    problem: str  # why the stage cannot serve any more; empty when it can
    narrow_error: float | None = None  # relative, of the latest activations that it sent on in eight bits
