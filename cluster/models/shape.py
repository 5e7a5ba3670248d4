"""The numbers of a model's configuration, checked.

Owns: reading config.json across the spellings of transformers 4 and 5. Whether the files agree with the numbers
is `cluster.models.facts`' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import ModelError
from cluster.models.families import short_context
from cluster.models.family import Attention, Family
from cluster.models.layout import sharing_layers

_NUMBER_MAX = 1 << 31  # no width or context of a model comes near
LAYERS_MAX = (1 << 12) - 1  # the deepest models have some 200 layers


@dataclass(frozen=True, slots=True)
class Latent:
    """Latent attention's widths: what is cached for each token, and what a head makes of it."""

    rank: int  # of the latent that keys and values follow from
    rotated: int  # of the part of a key that knows its position, shared by the heads
    plain: int  # of the rest of a head's key
    value: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a text model as its configuration gives them."""

    layer_count: int
    hidden_size: int
    vocab_size: int
    context_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dense_width: int  # of a dense MLP
    expert_width: int  # of one expert; 0 without experts
    experts: int
    experts_used: int  # for each token
    shared_width: int  # of the expert that every token uses besides
    latent: Latent | None
    memory: int  # elements of a gated delta rule's memory in one layer; 0 without
    query_width: int
    state_width: int  # elements that a recurrent layer works with for each token
    input_width: int  # of the input that each layer has for itself; 0 without
    sharing_layers: int  # at the end, which attend to keys and values of earlier ones

    @property
    def attention_width(self) -> int:
        """Elements of queries, keys and values for each token. Queries of latent attention exist twice: as wide as
        keys are, and as wide as what is cached."""
        if self.latent is not None:
            latent = self.latent
            return self.heads * (latent.rank + 2 * latent.rotated + latent.plain + latent.value) + self.cache_width
        return max(self.query_width + 2 * self.kv_heads * self.head_dim, self.state_width)

    @property
    def cache_width(self) -> int:
        """Elements that a layer caches for each token."""
        if self.latent is not None:
            return self.latent.rank + self.latent.rotated
        return 2 * self.kv_heads * self.head_dim

    @property
    def experts_width(self) -> int:
        """Elements of the inner states of a token's experts."""
        return self.expert_width * self.experts_used + self.shared_width

    def key_rows(self, attention: Attention) -> int | None:
        """Rows of the matrix that makes keys; None when layers differ."""
        match attention:
            case Attention.FUSED:
                return (self.heads + 2 * self.kv_heads) * self.head_dim
            case Attention.SEPARATE | Attention.OUT:
                return self.kv_heads * self.head_dim
            case Attention.LATENT:
                return self.cache_width
            case Attention.VARIED:
                return None


def read_shape(family: Family, config: Mapping[str, object], where: str) -> Shape:
    """The numbers of `config`, the text model's configuration."""

    def number(*names: str, default: int | None = None, below: int = _NUMBER_MAX) -> int:
        silent = family.defaults.get(names[0], default)
        value = next((config[name] for name in names if config.get(name) is not None), silent)
        # bool is an int to Python and must not pass for one.
        if type(value) is not int or not 0 < value < below:
            raise ModelError(
                f"{where}: expected {names[0]} to be a whole number from 1 to {below - 1}, found {value!r:.40}"
            )
        return value

    hidden_size, heads = number("hidden_size"), number("num_attention_heads")
    expert_width, experts, experts_used, shared_width = 0, 0, 0, 0
    if family.has_experts and (family.experts_switch is None or config.get(family.experts_switch)):
        expert_width = number(family.expert_width)
        experts = number("num_experts", "num_local_experts", "n_routed_experts")
        experts_used = number("num_experts_per_tok", "top_k_experts")
        if config.get("n_shared_experts"):
            shared_width = number("n_shared_experts") * expert_width
        elif config.get("shared_expert_intermediate_size"):
            shared_width = number("shared_expert_intermediate_size")
        elif family.shared_expert:
            shared_width = expert_width
        if experts_used > experts:
            raise ModelError(f"{where}: expected num_experts_per_tok up to {experts}, found {experts_used}")
    latent = None
    if family.attention is Attention.LATENT:
        latent = Latent(
            rank=number("kv_lora_rank"),
            rotated=number("qk_rope_head_dim"),
            plain=number("qk_nope_head_dim"),
            value=number("v_head_dim"),
        )
    head_dim = number("head_dim", default=family.head_dim or max(1, hidden_size // heads))
    memory, state_width = 0, 0
    if family.states is not None and family.states.has_matrix:
        value_heads, key_size = number("linear_num_value_heads"), number("linear_key_head_dim")
        value_size = number("linear_value_head_dim")
        memory = value_heads * key_size * value_size
        # The library brings keys to as many heads as values have, in float32, and holds some eight such tensors.
        state_width = 8 * value_heads * max(key_size, value_size)
    elif family.states is not None:
        state_width = 4 * hidden_size
    input_width = 0
    if (setting := family.input_width) and config.get(setting, family.defaults.get(setting)) != 0:
        input_width = number(setting)
    context_tokens = number("max_position_embeddings")
    return Shape(
        layer_count=number("num_hidden_layers", below=LAYERS_MAX + 1),
        hidden_size=hidden_size,
        vocab_size=number("vocab_size"),
        context_tokens=min(context_tokens, short_context(config) or context_tokens),
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_dim=head_dim,
        dense_width=number(family.dense_width, "block_ff_dim", default=expert_width or None),
        expert_width=expert_width,
        experts=experts,
        experts_used=experts_used,
        shared_width=shared_width,
        latent=latent,
        memory=memory,
        query_width=heads * head_dim * (2 if family.gated_queries else 1),
        state_width=state_width,
        input_width=input_width,
        sharing_layers=sharing_layers(config),
    )
