"""Nodes and models as placement sees them, named or drawn from a seed. Sizes are a few thousand bytes: what
matters is how they compare, and small numbers read better in a failure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from cluster.models.facts import LayerFacts, ModelFacts
from cluster.models.formats import HALF_EXPERTS, Packing
from cluster.nodes import GroupMemory, MemoryReport, NodeFacts, Pressure
from cluster.placement import stage_cost
from cluster.types import Backend, DType, Format, HostId, LayerRange, NodeId, TensorSpec

UNPACKED = frozenset({Format(Packing.NONE)})
PACKED = UNPACKED | {Format(Packing.AFFINE)}
EVERYTHING = frozenset(map(Format, Packing)) | {HALF_EXPERTS}


def node(
    name: str,
    budget_bytes: int,
    *,
    host: str | None = None,
    host_budget_bytes: int | None = None,
    groups: Mapping[str, int] = MappingProxyType({}),
    backend: Backend = Backend.TORCH,
    formats: frozenset[Format] = EVERYTHING,
) -> NodeFacts:
    """A node; alone on its host unless one is named. `groups` are the control groups around it, the outermost first,
    with their budgets."""
    host_bytes = budget_bytes if host_budget_bytes is None else host_budget_bytes
    around = tuple(GroupMemory(name, group_bytes) for name, group_bytes in groups.items())
    memory = MemoryReport(budget_bytes, host_bytes, 0, host_bytes, Pressure.NORMAL, "", host_bytes // 8, around)
    return NodeFacts(
        NodeId(f"id-{name}"), name, "default", HostId(host or name), "", backend, "cpu", memory, 1, "", "", formats
    )


def with_memory(
    of: NodeFacts,
    *,
    budget_bytes: int,
    host_budget_bytes: int,
    more_in_groups: Mapping[str, int] = MappingProxyType({}),
) -> NodeFacts:
    groups = tuple(
        replace(group, budget_bytes=group.budget_bytes + more_in_groups.get(group.id, 0)) for group in of.memory.groups
    )
    memory = replace(of.memory, budget_bytes=budget_bytes, host_budget_bytes=host_budget_bytes, groups=groups)
    return replace(of, memory=memory)


def model(
    layer_bytes: list[int],
    *,
    streamed: list[int] | None = None,
    kv: int = 1,
    ends: tuple[int, int, int] = (0, 0, 0),
    context: int = 8,
    tied: bool = False,
    backends: frozenset[Backend] = frozenset(Backend),
    cuts: frozenset[int] | None = None,
    formats: frozenset[Format] = UNPACKED,
    forgetting: Sequence[tuple[int, int | None] | tuple[()]] | None = None,
) -> ModelFacts:
    """A model whose layers take `layer_bytes`; `ends` are embedding, head and norm. `forgetting` layers have a state of
    so many bytes, or keep so many positions."""
    count = len(layer_bytes)
    return ModelFacts(
        architecture="PaperForCausalLM",
        model_type="llama",
        layer_count=count,
        hidden_size=1,
        vocab_size=1,
        context_tokens=context,
        dtype=DType.F32,
        tied=tied,
        quantization=None,
        backends=backends,
        layers=tuple(
            LayerFacts(dict.fromkeys(backends, size), read, kv, *forgets)
            for size, read, forgets in zip(
                layer_bytes, streamed or layer_bytes, forgetting or [()] * count, strict=True
            )
        ),
        embedding_bytes=ends[0],
        head_bytes=ends[0] if tied else ends[1],
        norm_bytes=ends[2],
        attention_width=1,
        mlp_width=1,
        legal_cuts=frozenset(range(count)) if cuts is None else cuts,
        boundary=(TensorSpec("hidden", (1,), DType.F32),),
        formats=formats,
    )


def random_model(rng: random.Random, layers_max: int, *, context: int = 8) -> ModelFacts:
    """Any model: equal or unequal layers, experts or none, free or forbidden cuts, tied or not."""
    count = rng.randint(1, layers_max)
    equal = rng.random() < 0.5
    size = rng.randint(50, 1500)
    sizes = [size if equal else rng.randint(50, 1500) for _ in range(count)]
    sparse = rng.random() < 0.3
    return model(
        sizes,
        formats=rng.choice([UNPACKED, UNPACKED, PACKED, UNPACKED | {HALF_EXPERTS}]),
        streamed=[rng.randint(1, size) for size in sizes] if sparse else None,
        kv=rng.randint(0, 20),
        ends=(rng.randint(0, 900), rng.randint(0, 900), 2),
        context=context,
        tied=rng.random() < 0.3,
        backends=frozenset(Backend) if rng.random() < 0.8 else frozenset({Backend.MLX}),
        forgetting=[rng.choice([(), (0, rng.randint(1, 8)), (rng.randint(1, 40), None)]) for _ in range(count)],
        cuts=None if rng.random() < 0.7 else frozenset({0, *(cut for cut in range(count) if rng.random() < 0.6)}),
    )


def random_nodes(rng: random.Random, facts: ModelFacts, count_max: int, *, context: int = 8) -> list[NodeFacts]:
    """Any nodes: alike or not, alone or several on a host, whose memory may or may not hold all of them. Each holds
    at most a share of the model, or a little more than all of it, so that some pools do and some do not."""
    backend = min(facts.backends)
    whole = stage_cost(
        facts, LayerRange(0, facts.layer_count), backend, context=context, users=1, on_cpu=True
    ).memory_bytes
    largest = int(whole * rng.choice([0.5, 0.8, 1.2, 1.6]))
    alike = rng.random() < 0.3
    hosts = {name: rng.randint(largest // 2, 2 * largest) for name in "xy"} if rng.random() < 0.6 else {}
    is_crowded = bool(hosts) and rng.random() < 0.5
    inner = {name: rng.randint(largest // 3, largest) for name in "pq"}
    outer = rng.randint(largest // 2, 2 * largest)
    kinds = [{}, {"p": inner["p"]}, {"slice": outer}, {"slice": outer, "q": inner["q"]}]
    is_grouped = bool(hosts) and rng.random() < 0.5
    nodes = []
    for index in range(max(rng.randint(1, count_max), rng.randint(1, count_max))):
        host = rng.choice([*hosts] if is_crowded else [None, *hosts])
        nodes.append(
            node(
                f"n{index}",
                largest if alike else rng.randint(largest // 3, largest),
                host=host,
                host_budget_bytes=hosts[host] + rng.choice([0, 0, 50]) if host else None,
                groups=rng.choice(kinds) if host and is_grouped else {},
                formats=EVERYTHING if rng.random() < 0.7 else rng.choice([UNPACKED, PACKED, EVERYTHING]),
                backend=backend if rng.random() < 0.7 else rng.choice([*Backend]),
            )
        )
    return nodes
