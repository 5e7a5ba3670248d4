"""Control messages to values and back. Protobuf stops here: nothing beyond this file and the two services
sees a generated class.

Text and numbers from other machines are checked here, so that what lies behind can trust its types.
"""

from __future__ import annotations

from math import inf
from typing import TypeVar

from cluster.errors import WireError
from cluster.limits import STEP_TOKENS_MAX
from cluster.models.quantising import BITS
from cluster.nodes import GroupMemory, Heartbeat, LoadPhase, LoadReport, MemoryReport, NodeFacts, NodePhase, Pressure
from cluster.plan import Assignment, Fence
from cluster.types import (
    Backend,
    DeploymentId,
    DType,
    Epoch,
    Format,
    HostId,
    LayerRange,
    ModelId,
    NodeId,
    TensorSpec,
)
from cluster.wire import node_pb2 as pb

_TEXT_CHARS_MAX = 512
_FORMATS_MAX = 256  # words, of which there are a dozen
_GROUPS_MAX = 32  # one within the other; systemd nests five
_PEERS_MAX = 64  # a node asks each of them what it holds; no cluster on a LAN has more
_Kind = TypeVar("_Kind", Backend, Pressure, DType, NodePhase)


def memory_out(memory: MemoryReport) -> pb.Memory:
    return pb.Memory(
        budget_bytes=memory.budget_bytes,
        host_budget_bytes=memory.host_budget_bytes,
        used_bytes=memory.used_bytes,
        total_bytes=memory.total_bytes,
        pressure=memory.pressure.value,
        explained=memory.explained,
        reserve_bytes=memory.reserve_bytes,
        groups=[pb.MemoryGroup(id=group.id, budget_bytes=group.budget_bytes) for group in memory.groups],
    )


def memory_in(message: pb.Memory) -> MemoryReport:
    return MemoryReport(
        budget_bytes=message.budget_bytes,
        host_budget_bytes=message.host_budget_bytes,
        used_bytes=message.used_bytes,
        total_bytes=message.total_bytes,
        pressure=_member(Pressure, message.pressure),
        explained=_text(message.explained),
        reserve_bytes=message.reserve_bytes,
        groups=tuple(GroupMemory(_text(group.id), group.budget_bytes) for group in message.groups[:_GROUPS_MAX]),
    )


def description_out(facts: NodeFacts, leased_to: str) -> pb.NodeDescription:
    return pb.NodeDescription(
        node_id=facts.id,
        name=facts.name,
        cluster=facts.cluster,
        host_id=facts.host,
        backend=facts.backend.value,
        device=facts.device,
        memory=memory_out(facts.memory),
        protocol=facts.protocol,
        version=facts.version,
        engine_version=facts.engine_version,
        leased_to=leased_to,
        formats=sorted(facts.formats),
    )


def description_in(message: pb.NodeDescription, address: str) -> NodeFacts:
    """A node's facts; `address` is how it was reached, which only the caller knows."""
    return NodeFacts(
        id=NodeId(_text(message.node_id)),
        name=_text(message.name),
        cluster=_text(message.cluster),
        host=HostId(_text(message.host_id)),
        address=address,
        backend=_member(Backend, message.backend),
        device=_text(message.device),
        memory=memory_in(message.memory),
        protocol=message.protocol,
        version=_text(message.version),
        engine_version=_text(message.engine_version),
        formats=frozenset(Format(_text(word)) for word in message.formats[:_FORMATS_MAX]),
    )


def fence_out(fence: Fence) -> pb.Fence:
    return pb.Fence(deployment=fence.deployment, epoch=fence.epoch)


def fence_in(message: pb.Fence) -> Fence:
    return Fence(DeploymentId(_text(message.deployment)), Epoch(message.epoch))


def assignment_out(assignment: Assignment, coordinator_id: str) -> pb.LoadRequest:
    return pb.LoadRequest(
        coordinator_id=coordinator_id,
        fence=fence_out(assignment.fence),
        model_id=assignment.model,
        local_folder=assignment.local_folder,
        weights_address=assignment.weights_address,
        stage=assignment.stage,
        stage_count=assignment.stage_count,
        first_layer=assignment.layers.first,
        last_layer=assignment.layers.last,
        layer_count=assignment.layer_count,
        boundary=[
            pb.TensorSpec(name=spec.name, shape=spec.shape, dtype=spec.dtype.value) for spec in assignment.boundary
        ],
        kv_tokens=assignment.kv_tokens,
        context_tokens=assignment.context_tokens,
        vocab_size=assignment.vocab_size,
        peer_addresses=assignment.peer_addresses,
        bits=assignment.bits or 0,
    )


def assignment_in(message: pb.LoadRequest) -> Assignment:
    try:
        layers = LayerRange(message.first_layer, message.last_layer)
    except ValueError as error:
        raise WireError(f"a load request with an impossible layer range: {error}") from error
    if layers.last > message.layer_count or not message.stage < message.stage_count <= message.layer_count:
        raise WireError(
            f"stage {message.stage} of {message.stage_count} with layers {layers} of {message.layer_count} cannot be"
        )
    if not 0 < message.context_tokens <= message.kv_tokens or not message.vocab_size:
        raise WireError("a load request needs a context, KV room for it, and a vocabulary size")
    if message.bits not in (0, *BITS):
        raise WireError(
            f"expected weights packed in {', '.join(map(str, BITS))} bits or not at all, found {message.bits}"
        )
    return Assignment(
        fence=fence_in(message.fence),
        model=ModelId(_text(message.model_id)),
        stage=message.stage,
        stage_count=message.stage_count,
        layers=layers,
        layer_count=message.layer_count,
        boundary=tuple(_spec_in(spec) for spec in message.boundary),
        kv_tokens=message.kv_tokens,
        context_tokens=message.context_tokens,
        vocab_size=message.vocab_size,
        local_folder=_text(message.local_folder, 4096),
        weights_address=_text(message.weights_address),
        peer_addresses=tuple(_text(address) for address in message.peer_addresses[:_PEERS_MAX]),
        bits=message.bits or None,
    )


def report_out(report: LoadReport) -> pb.LoadProgress:
    return pb.LoadProgress(
        phase=pb.LoadProgress.Phase.Value(report.phase.name),
        done_bytes=report.done_bytes,
        total_bytes=report.total_bytes,
        received_bytes=report.received_bytes,
        rate_bytes_s=report.rate_bytes_s,
    )


def report_in(message: pb.LoadProgress) -> LoadReport:
    name = pb.LoadProgress.Phase.Name(message.phase)
    if name not in LoadPhase.__members__:
        raise WireError(f"a load is in unknown phase {name}")
    return LoadReport(
        phase=LoadPhase[name],
        done_bytes=message.done_bytes,
        total_bytes=message.total_bytes,
        received_bytes=message.received_bytes,
        rate_bytes_s=message.rate_bytes_s,
    )


def heartbeat_out(beat: Heartbeat) -> pb.Heartbeat:
    return pb.Heartbeat(
        fence=fence_out(beat.fence) if beat.fence else None,
        phase=beat.phase.value,
        steps_done=beat.steps_done,
        steps_queued=beat.steps_queued,
        memory=memory_out(beat.memory),
        kv_tokens_used=beat.kv_tokens_used,
        sequences=beat.sequences,
        problem=beat.problem,
        narrow_error=beat.narrow_error,
    )


def heartbeat_in(message: pb.Heartbeat) -> Heartbeat:
    return Heartbeat(
        fence=fence_in(message.fence) if message.HasField("fence") else None,
        phase=_member(NodePhase, message.phase),
        steps_done=message.steps_done,
        steps_queued=message.steps_queued,
        memory=memory_in(message.memory),
        kv_tokens_used=message.kv_tokens_used,
        sequences=message.sequences,
        problem=_text(message.problem, 2000),
        narrow_error=_error(message.narrow_error) if message.HasField("narrow_error") else None,
    )


def _spec_in(message: pb.TensorSpec) -> TensorSpec:
    spec = TensorSpec(_text(message.name), tuple(message.shape), _member(DType, message.dtype))
    if not 0 < spec.token_bytes * STEP_TOKENS_MAX < 1 << 34:
        raise WireError(f"a boundary tensor of {spec.token_bytes} bytes a token is beyond any model")
    return spec


def _error(error: float) -> float:
    """A relative error that another machine tells; a number, so that JSON can hold it."""
    if not 0 <= error < inf:
        raise WireError(f"expected a relative error, found {error}")
    return error


def _text(text: str, chars_max: int = _TEXT_CHARS_MAX) -> str:
    """Text that another machine sent and that people will see: bounded, and printable on one line."""
    if len(text) > chars_max or not text.isprintable():
        raise WireError(f"expected at most {chars_max} printable characters, found {text[:40]!r}")
    return text


def _member(kind: type[_Kind], text: str) -> _Kind:
    try:
        return kind(text)
    except ValueError as error:
        raise WireError(f"unknown {kind.__name__} {text[:40]!r}") from error
