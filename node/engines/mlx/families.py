"""How mlx-lm computes each family: one row for each `model_type`, every exception with its reason.

Owns: what differs between families inside of mlx-lm. Reads no configuration; that is `arguments`' business.
"""

from __future__ import annotations

from collections.abc import Mapping

from node.engines.mlx.experts import Stacks
from node.engines.mlx.family import MlxFamily, Rotations, States, Windows

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
    "ministral3": MlxFamily(
        "ministral3",
        frozenset({"yarn"}),
        1_000_000.0,
        _SILU,
        norm_eps=1e-5,
        rotations=Rotations.WITH_GROWING_QUERIES,
    ),
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
    "glm4": MlxFamily(
        "glm4",
        _PLAIN,
        10_000.0,
        _SILU,
        {"attention_bias": True},
        lacks=frozenset({"rope_scaling"}),
        tied=False,
        norm_eps=1.5625e-7,
        rotations=Rotations.PARTIAL,
        rotated=0.5,
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
    # One expert for each token. Its own class of a whole model is the vision-language one.
    "llama4_text": MlxFamily(
        "llama4",
        frozenset({"default", "llama3"}),
        500_000.0,
        {**_SILU, "num_experts_per_tok": 1},
        {
            "attention_bias": False,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "interleave_moe_layer_step": 1,
            "num_experts_per_tok": 1,
            "use_qk_norm": True,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "attn_scale": 0.1,
        },
        classes=("LanguageModel", "TextArgs"),
        tied=False,
        norm_eps=1e-5,
        experts_field="num_local_experts",
        windows=Windows.CHUNKED,
        stacks=Stacks("feed_forward.experts.", "feed_forward.experts.", inputs_first=True),
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
