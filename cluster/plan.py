"""A plan: an ordered list of stages that owns every layer exactly once.

Made by `cluster.placement`, installed by the coordinator, obeyed by the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.types import Backend, DeploymentId, Epoch, LayerRange, ModelId, NodeId, TensorSpec


@dataclass(frozen=True, slots=True)
class Stage:
    """A contiguous layer range on a node. `members` has one node; a tensor-parallel group would have more."""

    index: int
    layers: LayerRange
    members: tuple[NodeId, ...]
    backend: Backend
    weight_bytes: int  # resident, embedding and head included
    kv_bytes: int  # for the plan's kv_tokens
    workspace_bytes: int  # activations of the largest step and the engine's own
    streamed_bytes: int  # weights read for each token: what a decode step costs

    @property
    def node(self) -> NodeId:
        return self.members[0]

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Which node holds which layers, and what the cluster promises with them."""

    layer_count: int
    stages: tuple[Stage, ...]
    context_tokens: int  # the longest prompt plus answer of one sequence
    users: int  # sequences of that length that fit at once
    boundary: tuple[TensorSpec, ...]
    left_out: tuple[tuple[NodeId, str], ...] = ()  # nodes without a stage, each with its reason

    def __post_init__(self) -> None:
        covered = 0
        for position, stage in enumerate(self.stages):
            if stage.index != position or stage.layers.first != covered:
                raise ValueError(f"stage {position} owns layers {stage.layers}; expected them to begin at {covered}")
            covered = stage.layers.last
        if covered != self.layer_count:
            raise ValueError(f"the stages own {covered} of {self.layer_count} layers")

    @property
    def kv_tokens(self) -> int:
        return self.context_tokens * self.users


@dataclass(frozen=True, slots=True)
class Fence:
    """What every frame must carry to be accepted."""

    deployment: DeploymentId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Assignment:
    """One stage of an installed plan, as its node is told: all that it needs to load and to check frames."""

    fence: Fence
    model: ModelId
    stage: int
    stage_count: int
    layers: LayerRange
    layer_count: int
    boundary: tuple[TensorSpec, ...]
    kv_tokens: int
    context_tokens: int
    vocab_size: int
    local_folder: str  # the model's folder at the coordinator; used when the node sees the same files
    weights_address: str  # HOST:PORT of the coordinator's gRPC server
    peer_addresses: tuple[str, ...] = ()  # of nodes that may hold some of the weights
    bits: int | None = None  # pack full-precision weights while they are loaded; None: as they are stored

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stage_count - 1
