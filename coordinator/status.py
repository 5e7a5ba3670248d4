"""What `GET /potluck/status` shows: one JSON-ready picture of the cluster, made from what the parts know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cluster.models.facts import ModelFacts
from cluster.plan import Plan
from cluster.types import NodeId
from coordinator.holders import Held
from coordinator.hub import ResolvedModel
from coordinator.opening import OpenModel
from coordinator.prefix_cache import PrefixStatus
from coordinator.roster import Member, Roster
from coordinator.serving import Serving
from coordinator.telemetry import TokenTime


def status_of(
    *,
    cluster: str,
    phase: str,
    reason: str,
    join: tuple[str, ...],
    model: OpenModel | None,
    roster: Roster,
    plan: Plan | None,
    serving: Serving | None,
    held: Mapping[NodeId, Held],
) -> Mapping[str, object]:
    """Units are in the names; times are means over the latest decode steps."""
    members = roster.members
    stage_of = {stage.node: stage.index for stage in plan.stages} if plan else {}
    return {
        "cluster": cluster,
        "phase": phase,
        "reason": reason,
        "join_addresses": list(join),
        "model": None if model is None else _model(model.resolved, model.facts),
        "nodes": [
            _node(member, stage_of.get(member.facts.id), held.get(member.facts.id)) for member in members.values()
        ],
        "turned_away": [{"who": who, "reason": why} for who, why in roster.turned_away.items()],
        "plan": None if plan is None else _plan(plan, members),
        "load": None if serving is None else _load(serving, _narrow_errors(plan, members)),
    }


def _model(resolved: ResolvedModel, facts: ModelFacts) -> dict[str, object]:
    return {
        "name": resolved.name,
        "source": resolved.text,
        "revision": resolved.commit,
        "architecture": facts.architecture,
        "layers": facts.layer_count,
        "bytes": facts.stored_bytes,
        "dtype": facts.dtype.value,
        "format": facts.format,
        "bits": facts.bits,
    }


def _node(member: Member, stage: int | None, held: Held | None) -> dict[str, object]:
    facts, beat = member.facts, member.beat
    return {
        "id": facts.id,
        "name": facts.name,
        "address": facts.address,
        "backend": facts.backend.value,
        "device": facts.device,
        "engine": facts.engine_version,
        "stage": stage,
        "phase": beat.phase.value if beat else "joining",
        "problem": beat.problem if beat else "",
        "steps_done": beat.steps_done if beat else 0,
        "kv_tokens_used": beat.kv_tokens_used if beat else 0,
        "weights": {
            "held_bytes": held.held_bytes if held else 0,
            "sending_bytes_s": held.sending_bytes_s if held else 0.0,
        },
        "memory": {
            "budget_bytes": facts.memory.budget_bytes,
            "reserve_bytes": facts.memory.reserve_bytes,
            "used_bytes": facts.memory.used_bytes,
            "total_bytes": facts.memory.total_bytes,
            "pressure": facts.memory.pressure.value,
            "explained": facts.memory.explained,
        },
    }


def _plan(plan: Plan, members: Mapping[NodeId, Member]) -> dict[str, object]:
    return {
        "context_tokens": plan.context_tokens,
        "users": plan.users,
        "boundary_bytes": sum(spec.token_bytes for spec in plan.boundary),  # for each token
        "stages": [
            {
                "index": stage.index,
                "node": _name(members, stage.node),
                "backend": stage.backend.value,
                "first_layer": stage.layers.first,
                "last_layer": stage.layers.last,
                "weight_bytes": stage.weight_bytes,
                "kv_bytes": stage.kv_bytes,
                "workspace_bytes": stage.workspace_bytes,
            }
            for stage in plan.stages
        ],
        "left_out": [{"node": _name(members, node), "reason": why} for node, why in plan.left_out],
    }


def _name(members: Mapping[NodeId, Member], node: NodeId) -> str:
    member = members.get(node)
    return member.facts.name if member else node


def _narrow_errors(plan: Plan | None, members: Mapping[NodeId, Member]) -> Iterator[float | None]:
    """Of what each stage sends on in eight bits, as its node says; None before it has."""
    for stage in plan.stages if plan else ():
        member = members.get(stage.node)
        yield member.beat.narrow_error if member and member.beat else None


def _load(serving: Serving, narrow_errors: Iterator[float | None]) -> dict[str, object]:
    waiting, running, reserved = serving.load
    times = serving.telemetry.token_time()
    return {
        "waiting": waiting,
        "running": running,
        "restarts": serving.restarts,
        "kv_tokens_reserved": reserved,
        "kv_tokens": serving.room.kv_tokens,
        "prefix_cache": _prefixes(serving.prefixes),
        "links": [
            {
                "bytes_s": link.bytes_s,
                "narrow": link.is_narrow,
                "narrow_tokens": link.narrow_tokens,
                "narrow_error": next(narrow_errors, None),
            }
            for link in serving.links
        ],
        "tokens_drawn": serving.telemetry.tokens_drawn,
        "stages_busy_s": list(serving.telemetry.stages_busy_s),
        "decode_steps": serving.telemetry.decode_steps,
        "decode_hops_s": serving.telemetry.decode_hops_s,
        "token_time": None if times is None else _times(times),
    }


def _prefixes(prefixes: PrefixStatus) -> dict[str, object]:
    return {
        "enabled": prefixes.enabled,
        "retained_sequences": prefixes.retained_sequences,
        "retained_tokens": prefixes.retained_tokens,
        "prompt_tokens": prefixes.prompt_tokens,
        "cached_tokens": prefixes.cached_tokens,
    }


def _times(times: TokenTime) -> dict[str, object]:
    return {
        "steps": times.steps,
        "total_s": times.total_s,
        "hops_s": times.hops_s,
        "stages": [
            {"receive_s": stage.receive_s, "queue_s": stage.queue_s, "compute_s": stage.compute_s}
            for stage in times.stages
        ],
    }
