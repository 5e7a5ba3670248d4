"""What a row of the family table says: the words in which families differ.

Knows no family; the rows are `cluster.models.families`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.types import Backend


class Attention(enum.Enum):
    """How a layer's attention is stored, with the tensors that every layer has for it."""

    SEPARATE = tuple(f"self_attn.{projection}_proj.weight" for projection in ("k", "q", "v", "o"))
    FUSED = ("self_attn.qkv_proj.weight", "self_attn.o_proj.weight")
    # Keys and values of all heads follow from one small latent for each token, and only that is cached. What makes
    # them of it is stored whole by transformers and in two parts by mlx-lm, so neither is demanded here.
    LATENT = ("self_attn.kv_a_proj_with_mqa.weight", "self_attn.o_proj.weight")
    # Heads of some layers are larger than those of others, and values may be keys before these are rotated.
    VARIED = tuple(f"self_attn.{name}_proj.weight" for name in ("k", "q", "o"))
    OUT = tuple(f"self_attn.{name}_proj.weight" for name in ("k", "q", "v", "out"))

    @property
    def tensors(self) -> tuple[str, ...]:
        """What every layer has for its attention; the first one's rows show the size of keys."""
        names: tuple[str, ...] = self.value
        return names


@dataclass(frozen=True, slots=True)
class States:
    """Layers that keep a state of fixed size in place of keys and values; a sequence is cut back to snapshots of it."""

    prefix: str  # of their tensors, by which a layer is known to be one
    window: str  # the tensor with as many elements as the convolution's last inputs
    has_matrix: bool  # a gated delta rule's memory, in float32


@dataclass(frozen=True, slots=True)
class Windows:
    """Layers that attend only to the last `sliding_window` positions, as transformers understands silence."""

    silent: int | None = None  # the window of a configuration that mentions none; None: no layer has one then
    seeing_all: int = 0  # every so many layers one attends to everything, where no list says so; 0: none does
    seeing_all_setting: str | None = None  # which states another period
    setting: str = "sliding_window"
    kind: str = "sliding_attention"  # in a list of layer types
    in_chunks: bool = False  # what a layer looks back to begins anew every so many positions
    listed: str | None = None  # the setting that lists 0 for layers that see everything, when there is no layer_types


@dataclass(frozen=True, slots=True)
class Family:
    """What holds for every model of one `model_type`."""

    model_type: str
    title: str
    engines: frozenset[Backend]  # that compute it exactly, in tests
    norms: tuple[str, ...]
    attention_norms: tuple[str, ...] = ()
    attention: Attention = Attention.SEPARATE
    dense_width: str = "intermediate_size"  # the setting for the inner size of a dense MLP
    dense_mlp: tuple[str, ...] = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    router: str | None = None  # the tensor that chooses experts, in the layers that have them
    experts_switch: str | None = None  # the setting without which a model of this family has no experts
    expert_width: str = "moe_intermediate_size"  # the setting for the inner size of one expert
    shared_expert: bool = False  # every token uses one more expert, as wide as the others
    head_dim: int | None = None  # when the configuration is silent; None: hidden size / heads
    windows: Windows | None = None
    ends_seeing_all: bool = False  # the last layer has no window, whatever the configuration says
    writes_scores: bool = False  # soft-caps or sinks: no fused attention computes them, so scores take memory
    states: States | None = None
    gated_queries: bool = False  # queries come with a gate as wide as they
    transposed: tuple[str, ...] = ()  # stacks of a layer's experts that are stored [experts, inputs, outputs]
    shares_keys: bool = False  # the last `num_kv_shared_layers` layers attend to keys and values of earlier ones
    input_width: str | None = None  # the setting for how wide an input is that each layer has for itself
    input_tensors: tuple[str, ...] = ()  # of a layer that has one
    whole_scores: bool = False  # mlx-lm's layers score a whole chunk at once, by themselves
    extra_copies: int = 0  # of the MLP's inner state, held at once beyond what most families' layers hold
    extra_layers: str | None = None  # the setting for layers behind the last that serve training alone
    refused: tuple[str, ...] = ()  # settings that change the result and that no engine honours
    narrowed: Mapping[str, frozenset[Backend]] = field(default_factory=dict)  # settings that only some engines honour
    defaults: Mapping[str, int] = field(default_factory=dict)  # what the family's configurations leave out

    @property
    def has_experts(self) -> bool:
        """Some layers choose experts for each token."""
        return self.router is not None

    @property
    def layer_tensors(self) -> tuple[str, ...]:
        """What every layer that attends has besides its MLP."""
        return self.attention.tensors + self.attention_norms + self.norms
