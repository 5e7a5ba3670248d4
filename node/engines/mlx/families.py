"""How mlx-lm computes each family: one row for each `model_type`, every exception with its reason.

Owns: what differs between families inside of mlx-lm. Reads no configuration; that is `arguments`' business.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from node.engines.mlx.experts import Stacks


class Rotations(enum.Enum):
    """Where a configuration states how positions rotate queries and keys, and in whose words mlx-lm wants it."""

    ONE = enum.auto()  # the same for all layers
    LOCAL_BASE = enum.auto()  # layers with a window have a base of their own
    SCALED_BEYOND_WINDOWS = enum.auto()  # one base; only layers without a window are scaled
    BY_KIND = enum.auto()  # each kind of layer has its own, and mlx-lm takes both as they are stated
    PARTIAL = enum.auto()  # some dimensions of a head only, and factors for each of them


class Windows(enum.Enum):
    """How mlx-lm knows which layers look back only `sliding_window` positions."""

    NONE = enum.auto()  # no layer does
    PERIOD = enum.auto()  # from the period at which layers recur that see everything
    LISTED = enum.auto()  # from `layer_types`
    IGNORED = enum.auto()  # it does not; the engine's own masks make it so


class States(enum.Enum):
    """How mlx-lm knows which layers keep a state of fixed size in place of keys and values."""

    NONE = enum.auto()  # no layer does
    PERIOD = enum.auto()  # from the period at which layers recur that attend
    LISTED = enum.auto()  # from `layer_types`


@dataclass(frozen=True, slots=True)
class MlxFamily:
    """How mlx-lm computes the models of one `model_type`."""

    module: str  # in mlx_lm.models
    rope_types: frozenset[str]
    rope_theta: float  # of a configuration that states none
    expected: Mapping[str, object]  # settings that mlx-lm takes for granted (or any of a set of values)
    copied: Mapping[str, object] = field(default_factory=dict)  # settings passed on, with what silence means
    nullable: frozenset[str] = frozenset()  # of the copied ones: null is a value, not silence
    lacks: frozenset[str] = frozenset()  # common settings that its argument class has no field for
    tied: bool | None = None  # the only kind of head that mlx-lm computes
    norm_eps: float = 1e-6  # of a configuration that states none
    experts_field: str = "num_experts"
    same: Mapping[str, str] = field(default_factory=dict)  # its own names for what other settings say
    classes: tuple[str, str] = ("Model", "ModelArgs")  # of the text model, and of its arguments
    witness: str | None = None  # a layer's tensor that tells mlx-lm how all of them are stored
    norm: str = "norm"  # what it calls the norm after the last layer
    rotations: Rotations = Rotations.ONE
    nests_rotation: bool = False  # it reads a rotation from `rope_parameters`, or its own default of these
    rotated: float = 1.0  # the part of a head that is rotated, of a configuration that states none
    windows: Windows = Windows.NONE
    attending: int = 0  # every so many layers one attends, among those with a state, if no list says so
    states: States = States.NONE
    wide_heads: bool = False  # layers that see everything may have larger heads, and fewer of them for keys
    returned: int = 0  # what its layers return beside hidden states
    groups_scores: bool = False  # scores are [rows, key heads, group, tokens, positions] when heads share keys
    transposed: tuple[str, ...] = ()  # matrices that transformers stores [in, out], within a layer, and no `.weight`
    stacks: Stacks | None = None  # experts that mlx-lm would not put in order itself
    raised: tuple[str, ...] = ()  # vectors of which only differences count, and that must not be negative


_PLAIN = frozenset({"default"})
_SCALED = frozenset({"default", "linear", "llama3", "yarn"})
_SILU: Mapping[str, object] = {"hidden_act": "silu"}
_GELU: Mapping[str, object] = {"hidden_activation": "gelu_pytorch_tanh"}
_UNBIASED: Mapping[str, object] = {"attention_bias": False}
_QWEN_EXPERTS: Mapping[str, object] = {
    "moe_intermediate_size": None,
    "num_experts_per_tok": None,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_DELTA_RULE: Mapping[str, object] = {
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_DEEPSEEK: Mapping[str, object] = {
    "attention_bias": False,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
}

MLX_FAMILIES: Mapping[str, MlxFamily] = {
    "llama": MlxFamily("llama", _SCALED, 10_000.0, _SILU, {"attention_bias": False, "mlp_bias": False}),
    # For mlx-lm it is Llama, whose windows come from a list that Mistral's configurations do not have.
    "mistral": MlxFamily("llama", _SCALED, 10_000.0, {**_SILU, **_UNBIASED}, windows=Windows.IGNORED),
    "qwen2": MlxFamily("qwen2", _SCALED, 10_000.0, _SILU, lacks=frozenset({"head_dim"})),
    "qwen3": MlxFamily("qwen3", _SCALED, 10_000.0, {**_SILU, **_UNBIASED}),
    # Its attention takes the base and nothing else, so a scaled rotation would be ignored.
    "qwen3_moe": MlxFamily("qwen3_moe", _PLAIN, 10_000.0, {**_SILU, **_UNBIASED}, _QWEN_EXPERTS),
    "olmo2": MlxFamily("olmo2", _SCALED, 10_000.0, {**_SILU, "mlp_bias": False}, _UNBIASED, norm_eps=1e-5),
    "olmo3": MlxFamily(
        "olmo3",
        _SCALED,
        500_000.0,
        _SILU,
        _UNBIASED,
        norm_eps=1e-5,
        rotations=Rotations.SCALED_BEYOND_WINDOWS,
        windows=Windows.LISTED,
    ),
    "phi3": MlxFamily(
        "phi3",
        frozenset({"default", "longrope"}),
        10_000.0,
        _SILU,
        norm_eps=1e-5,
        lacks=frozenset({"head_dim"}),
        rotations=Rotations.PARTIAL,
        windows=Windows.IGNORED,
    ),
    # One mask, as if every layer saw everything, and it broadcasts over rows only while heads do not share keys.
    "gemma2": MlxFamily(
        "gemma2",
        _PLAIN,
        10_000.0,
        {**_GELU, **_UNBIASED},
        {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        lacks=frozenset({"max_position_embeddings", "rope_scaling"}),
        tied=True,
        windows=Windows.IGNORED,
        groups_scores=True,
    ),
    "gemma3_text": MlxFamily(
        "gemma3_text",
        frozenset({"default", "linear"}),
        1_000_000.0,
        {**_GELU, **_UNBIASED},
        {"query_pre_attn_scalar": 256},
        lacks=frozenset({"tie_word_embeddings"}),  # the head is tied when the model is given none
        rotations=Rotations.LOCAL_BASE,
        windows=Windows.PERIOD,
    ),
    # What layers return beside hidden states are keys and values, for the later layers that share them.
    "gemma4_text": MlxFamily(
        "gemma4_text",
        frozenset({"default", "proportional"}),
        1_000_000.0,
        {**_GELU, **_UNBIASED, "use_bidirectional_attention": frozenset({None, "vision"})},
        {
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262_144,
            "attention_k_eq_v": False,
            "final_logit_softcapping": None,
            "use_double_wide_mlp": False,
            "enable_moe_block": False,
            "top_k_experts": None,
            "moe_intermediate_size": None,
        },
        rotations=Rotations.BY_KIND,
        windows=Windows.LISTED,
        wide_heads=True,
        returned=2,
    ),
    "gpt_oss": MlxFamily(
        "gpt_oss",
        frozenset({"default", "yarn"}),
        150_000.0,
        {**_SILU, "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        {"num_experts_per_tok": 4},
        lacks=frozenset({"max_position_embeddings"}),
        tied=False,
        norm_eps=1e-5,
        experts_field="num_local_experts",
        windows=Windows.LISTED,
        transposed=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
    "deepseek_v3": MlxFamily(
        "deepseek_v3",
        frozenset({"default", "yarn"}),
        10_000.0,
        {**_SILU, "rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
        _DEEPSEEK,
        nullable=frozenset({"q_lora_rank"}),  # null: queries are not compressed
        lacks=frozenset({"head_dim"}),
        tied=False,
        experts_field="n_routed_experts",
        # mlx-lm gives the experts of groups that lost a score of zero, which must be below that of all others.
        raised=("mlp.gate.e_score_correction_bias",),
    ),
    # Norms and experts are put in order only where a slice has experts, so every layer has to have them.
    "qwen3_next": MlxFamily(
        "qwen3_next",
        _PLAIN,
        10_000.0,
        {**_SILU, **_UNBIASED, "decoder_sparse_step": 1, "mlp_only_layers": []},
        {
            **_DELTA_RULE,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 512,
            "num_experts_per_tok": 10,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 512,
        },
        rotations=Rotations.PARTIAL,
        rotated=0.25,
        states=States.PERIOD,
        attending=4,
    ),
    # Norms are put in order only where a slice has a convolution; so one is shown to it.
    "qwen3_5_text": MlxFamily(
        "qwen3_5",
        _PLAIN,
        10_000.0,
        {**_SILU, **_UNBIASED},
        _DELTA_RULE,
        classes=("TextModel", "TextModelArgs"),
        witness="linear_attn.conv1d.weight",
        nests_rotation=True,
        rotations=Rotations.PARTIAL,
        rotated=0.25,
        states=States.PERIOD,
        attending=4,
    ),
    # For mlx-lm the same with experts in every layer, whose weights always add up to one.
    "qwen3_5_moe_text": MlxFamily(
        "qwen3_5",
        _PLAIN,
        10_000.0,
        {**_SILU, **_UNBIASED, "norm_topk_prob": True},
        {
            **_DELTA_RULE,
            "moe_intermediate_size": 512,
            "num_experts_per_tok": 8,
            "shared_expert_intermediate_size": 512,
        },
        classes=("TextModel", "TextModelArgs"),
        witness="linear_attn.conv1d.weight",
        nests_rotation=True,
        rotations=Rotations.PARTIAL,
        rotated=0.25,
        states=States.PERIOD,
        attending=4,
        stacks=Stacks("mlp.experts.", "mlp.switch_mlp."),
    ),
    "lfm2": MlxFamily(
        "lfm2",
        _PLAIN,
        1_000_000.0,
        {},
        {
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
        },
        lacks=frozenset({"head_dim", "rms_norm_eps", "rope_scaling"}),
        tied=True,
        same={"block_dim": "hidden_size", "block_ff_dim": "intermediate_size"},
        norm="embedding_norm",
        states=States.LISTED,
    ),
}
