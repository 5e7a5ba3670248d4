"""Why a model does not fit, and what would.

Owns: the text of DoesNotFit and the numbers in it. Every alternative that it names has been placed; nothing is
guessed, except the size of a model in fewer bits, which follows from the format.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol

from cluster.models.facts import LayerFacts, ModelFacts
from cluster.models.formats import READERS, Packing, Quantization
from cluster.models.quantising import GROUP
from cluster.nodes import MemoryReport, NodeFacts, Pressure
from cluster.placement.ask import CONTEXT_STEP, Ask
from cluster.placement.costs import CostTable
from cluster.placement.pool import Pool, able_pool, pool_of, why_unable
from cluster.quantities import GIB, KIB, MIB, format_bytes
from cluster.types import CPU, Format, HostId, NodeId


class Fits(Protocol):
    """Whether a model can be placed. Given by the caller, which searches."""

    def __call__(self, facts: ModelFacts, pool: Pool, ask: Ask, context: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class Shortage:
    """What is missing for a context, and each single change that would do; None where it would not."""

    needed_bytes: int  # on as few machines as the ask allows
    usable_bytes: int
    missing_in_all_bytes: int  # 0 when the sum would do and only its distribution does not
    missing_on: tuple[NodeFacts, int] | None  # the machine that lacks least, and how much
    fewer_bits: tuple[int, int] | None  # bits, and the weights' size in them
    shorter_context: int | None
    fewer_users: int | None
    another_machine_bytes: int | None


def refuse(facts: ModelFacts, pool: Pool, ask: Ask, context: int, *, fits: Fits) -> str:
    """The message for a model that does not fit `pool` with `context`."""
    return explain_shortage(find_shortage(facts, pool, ask, context, fits=fits), facts, ask, context)


def refuse_count(facts: ModelFacts, nodes: Sequence[NodeFacts], pool: Pool, ask: Ask) -> str:
    """The message when there are too few nodes, or too few layers for them."""
    able, layers = len(pool.candidates), len(facts.legal_cuts | {0})
    if ask.stages_min > layers:
        return (
            f"{facts.architecture}: a stage for each of {ask.stages_min} nodes is asked for, but the model can be cut "
            f"into {layers} at most; ask for {layers} or fewer"
        )
    left_out: dict[str, list[str]] = defaultdict(list)
    for node in sorted(nodes, key=lambda node: node.name):
        if (reason := why_unable(facts, node)) is not None:
            left_out[reason].append(node.name)
    because = "".join(f"; left out: {', '.join(names)} ({reason})" for reason, names in left_out.items())
    return (
        f"{facts.architecture}: {ask.stages_min} {'node is' if ask.stages_min == 1 else 'nodes are'} needed, and "
        f"{able} can run this model{because}. Start more nodes, or ask for fewer"
    )


def find_shortage(facts: ModelFacts, pool: Pool, ask: Ask, context: int, *, fits: Fits) -> Shortage:
    """Measure the shortage by placing the model with one thing changed at a time."""
    table = CostTable(facts, context=context, users=ask.users)
    kinds = {candidate.node.on_cpu for candidate in pool.candidates} or {True}
    alone = [min(int(table.memory(backend, on_cpu)[0, -1]) for backend in facts.backends) for on_cpu in kinds]
    needed = min(alone) + (ask.stages_min - 1) * table.stage_base_bytes
    enough = max(alone) + (ask.stages_min - 1) * table.stage_base_bytes

    def with_more(node: NodeFacts, extra: int) -> bool:
        return fits(facts, _grown(pool, node, extra), ask, context)

    def with_another(size: int) -> bool:
        others = [candidate.node for candidate in pool.candidates]
        return fits(facts, pool_of([*others, _machine(facts, size, others)]), ask, context)

    missing_on = None
    for node in _one_of_each(pool):
        # The search for a smaller number starts from the best so far: no machine that lacks more is of interest.
        most = missing_on[1] if missing_on else enough
        extra = _least(most, lambda size, node=node: with_more(node, size))  # type: ignore[misc]
        if extra is not None and (missing_on is None or extra < missing_on[1]):
            missing_on = (node, extra)
    return Shortage(
        needed_bytes=needed,
        usable_bytes=pool.usable_bytes,
        missing_in_all_bytes=max(0, needed - pool.usable_bytes),
        missing_on=missing_on,
        fewer_bits=_fewer_bits(facts, pool, ask, context, fits),
        shorter_context=_most(
            (context - 1) // CONTEXT_STEP, lambda steps: fits(facts, pool, ask, steps * CONTEXT_STEP), CONTEXT_STEP
        ),
        fewer_users=_most(ask.users - 1, lambda users: fits(facts, pool, replace(ask, users=users), context)),
        another_machine_bytes=_least(max(alone), with_another),
    )


def explain_shortage(shortage: Shortage, facts: ModelFacts, ask: Ask, context: int) -> str:
    """The shortage in words."""
    users = "1 user" if ask.users == 1 else f"{ask.users} users"
    text = (
        f"{facts.architecture} with {context:,} tokens of context for {users} needs at least "
        f"{format_bytes(shortage.needed_bytes)}, and the machines offer {format_bytes(shortage.usable_bytes)}: "
    )
    if shortage.missing_in_all_bytes:
        text += f"{format_bytes(shortage.missing_in_all_bytes)} are missing in all"
    elif shortage.missing_on:
        node, extra = shortage.missing_on
        text += f"enough together, but no cut fits each of them: {format_bytes(extra)} are missing on {node.name}"
    else:
        text += "enough together, but several of them are too small for even one layer"
    options = []
    if shortage.fewer_bits:
        bits, size = shortage.fewer_bits
        is_whole = facts.quantization is None or facts.bits is not None
        how = f"--bits {bits}" if is_whole else f"the same model in {bits} bits"
        options.append(f"{how} (about {format_bytes(size)} of weights)")
    if shortage.shorter_context:
        options.append(f"a context of {shortage.shorter_context:,} tokens (--context {shortage.shorter_context})")
    if shortage.fewer_users:
        options.append(f"{shortage.fewer_users} at once instead of {ask.users} (--users {shortage.fewer_users})")
    if shortage.missing_on:
        node, extra = shortage.missing_on
        options.append(f"{format_bytes(extra)} more on {node.name}")
    if shortage.another_machine_bytes:
        options.append(f"one more machine with {format_bytes(shortage.another_machine_bytes)}")
    if not options:
        return f"{text}. No single change would make it fit; a smaller model would"
    return f"{text}. Any of these would fit: {'; '.join(options)}"


def in_fewer_bits(facts: ModelFacts, bits: int) -> ModelFacts:
    """The same model packed as MLX packs it. Norms stay as they are, but they are too small to tell apart here."""
    packed = facts.quantization
    stored_bits = packed.bits + 32 / packed.group if packed else 8 * facts.dtype.size_bytes
    ratio = (bits + 32 / GROUP) / stored_bits
    backends = facts.backends & READERS[Packing.AFFINE]

    def shrink(count: int) -> int:
        return ceil(count * ratio)

    return replace(
        facts,
        quantization=Quantization(Packing.AFFINE, bits, GROUP),
        backends=backends,
        formats=frozenset(map(Format, (Packing.NONE, Packing.AFFINE))),
        layers=tuple(
            LayerFacts(
                dict.fromkeys(backends, shrink(max(layer.resident_bytes.values()))),
                shrink(layer.streamed_bytes),
                layer.kv_bytes_per_token,
                layer.state_bytes,
                layer.kv_tokens_max,
            )
            for layer in facts.layers
        ),
        embedding_bytes=shrink(facts.embedding_bytes),
        head_bytes=shrink(facts.head_bytes),
        inputs_bytes=shrink(facts.inputs_bytes),
        inputs_streamed_bytes=shrink(facts.inputs_streamed_bytes),
    )


def _fewer_bits(facts: ModelFacts, pool: Pool, ask: Ask, context: int, fits: Fits) -> tuple[int, int] | None:
    stored_bits = facts.quantization.bits if facts.quantization else 8 * facts.dtype.size_bytes
    nodes = [candidate.node for candidate in pool.candidates]
    for bits in (8, 4):
        smaller = in_fewer_bits(facts, bits)
        able = able_pool(smaller, nodes)
        if bits < stored_bits and able.candidates and fits(smaller, able, ask, context):
            return bits, smaller.stored_bytes
    return None


def _one_of_each(pool: Pool) -> list[NodeFacts]:
    """One node for each kind of machine: two alike lack the same."""
    found: dict[object, NodeFacts] = {}
    for candidate in pool.candidates:
        found.setdefault((candidate.kind, candidate.shared), candidate.node)
    return list(found.values())


def _grown(pool: Pool, grown: NodeFacts, extra: int) -> Pool:
    """The pool with `extra` bytes more in one machine, in that node's share of it, and in the groups around it."""

    def after(node: NodeFacts) -> NodeFacts:
        if node.host != grown.host:
            return node
        own = extra if node.id == grown.id else 0
        around = {group.id for group in grown.memory.groups}
        groups = (replace(g, budget_bytes=g.budget_bytes + extra * (g.id in around)) for g in node.memory.groups)
        memory = replace(
            node.memory,
            budget_bytes=node.memory.budget_bytes + own,
            host_budget_bytes=node.memory.host_budget_bytes + extra,
            groups=tuple(groups),
        )
        return replace(node, memory=memory)

    return pool_of([after(candidate.node) for candidate in pool.candidates])


def _machine(facts: ModelFacts, size: int, others: Sequence[NodeFacts]) -> NodeFacts:
    """A machine that nobody has yet. It computes on a GPU only where all others do."""
    memory = MemoryReport(size, size, 0, size, Pressure.NORMAL, "imagined")
    backend = sorted(facts.backends)[0]
    device = CPU if not others or any(node.on_cpu for node in others) else others[0].device
    return NodeFacts(NodeId("?"), "another", "", HostId("?"), "", backend, device, memory, 0, "", "", facts.formats)


def _least(most: int, does: Callable[[int], bool]) -> int | None:
    """The smallest size that does, as people write sizes: rounded up to a tenth of its unit. At most about `most`."""
    unit = next((unit for unit in (GIB, MIB, KIB) if most >= unit), 10)
    step = unit // 10
    low, high = 0, -(-most // step) + 1
    if not does(high * step):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if does(middle * step):
            high = middle
        else:
            low = middle
    # What turns out to be less than a unit is told in the next smaller one.
    return _least(high * step, does) if high * step < unit and step > 1 else high * step


def _most(most: int, does: Callable[[int], bool], scale: int = 1) -> int | None:
    """The largest number from 1 to `most` that does, times `scale`."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if does(middle):
            low = middle
        else:
            high = middle - 1
    return low * scale if low else None
