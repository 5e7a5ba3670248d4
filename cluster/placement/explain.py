"""What `potluck plan` shows: a plan stage by stage, and what a pool could hold.

Owns: the numbers, not their layout on a screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cluster.models.facts import ModelFacts
from cluster.models.formats import Packing
from cluster.nodes import NodeFacts
from cluster.placement.pool import able_pool, pool_of
from cluster.plan import Plan
from cluster.quantities import GIB, KIB
from cluster.types import Backend, Format, LayerRange, NodeId


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage of a plan beside the budget of its node."""

    index: int
    node: NodeId
    name: str
    backend: Backend
    layers: LayerRange
    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    budget_bytes: int
    reserve_bytes: int  # what the node keeps back of its memory on purpose
    total_bytes: int
    streamed_share: float  # of the bytes that all stages read for one token: where a token's time goes

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.weight_bytes - self.kv_bytes - self.workspace_bytes


def describe(plan: Plan, facts: ModelFacts, nodes: Sequence[NodeFacts]) -> tuple[StageRow, ...]:
    """The stages of `plan`, with what each node may use."""
    pool = {candidate.node.id: candidate for candidate in able_pool(facts, nodes).candidates}
    streamed = sum(stage.streamed_bytes for stage in plan.stages)
    return tuple(
        StageRow(
            index=stage.index,
            node=stage.node,
            name=pool[stage.node].node.name,
            backend=stage.backend,
            layers=stage.layers,
            weight_bytes=stage.weight_bytes,
            kv_bytes=stage.kv_bytes,
            workspace_bytes=stage.workspace_bytes,
            budget_bytes=pool[stage.node].budget_bytes,
            reserve_bytes=pool[stage.node].node.memory.reserve_bytes,
            total_bytes=pool[stage.node].node.memory.total_bytes,
            streamed_share=stage.streamed_bytes / streamed,
        )
        for stage in plan.stages
    )


# Billions of parameters, and the cache for each token in 16 bits, of a usual model of that size: layers x 2 x key
# heads x head size x 2 bytes (16 x 2 x 8 x 64 x 2 for the first).
_SIZES: Final = (
    (1, 32 * KIB),
    (4, 144 * KIB),
    (8, 144 * KIB),
    (14, 160 * KIB),
    (32, 256 * KIB),
    (70, 320 * KIB),
    (120, 352 * KIB),
    (235, 188 * KIB),
    (405, 504 * KIB),
)
_BITS: Final = {16: 16.0, 8: 8.5, 4: 4.5}  # of each weight as stored, the scales of packed formats included
_WORKSPACE_BYTES: Final = GIB // 2  # for each node; see costs.py for what it is made of


@dataclass(frozen=True, slots=True)
class RoughFit:
    """Whether a usual model of a size fits. An estimate: the real one needs the model's headers."""

    billions: int
    bits: int
    needed_bytes: int
    usable_bytes: int
    readers: int  # nodes that can hold weights of so many bits

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.usable_bytes


def rough_fits(nodes: Sequence[NodeFacts], *, context: int = 8192, users: int = 1) -> tuple[RoughFit, ...]:
    """The usual model sizes against all of the pool's memory; those in 8 and 4 bits on the nodes that read them."""
    rows = []
    for bits, stored_bits in _BITS.items():
        pool = pool_of([node for node in nodes if bits == 16 or Format(Packing.AFFINE) in node.formats])
        usable_bytes = max(0, pool.usable_bytes - _WORKSPACE_BYTES * len(pool.candidates))
        for billions, kv_bytes_per_token in _SIZES:
            weights = int(billions * 1_000_000_000 * stored_bits / 8)
            rows.append(
                RoughFit(
                    billions, bits, weights + kv_bytes_per_token * context * users, usable_bytes, len(pool.candidates)
                )
            )
    return tuple(sorted(rows, key=lambda row: (row.billions, -row.bits)))
