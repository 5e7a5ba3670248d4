"""The model families that Potluck runs, and what it must know of each beyond the files.

Owns: the one table keyed by `model_type`. A row says which engines compute the family exactly in tests; a family
without one is refused by name, because a model that loads and is subtly wrong is worse than one that does not load.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.errors import ModelError
from cluster.models.family import Attention, Family, States, Windows
from cluster.models.layout import sharing_layers
from cluster.models.wrappers import text_model_of
from cluster.types import Backend

_BOTH = frozenset(Backend)

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_AROUND_MLP_NORMS = ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight")
_AFTER_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")

_OWN_INPUT = ("per_layer_input_gate.weight", "per_layer_projection.weight", "post_per_layer_input_norm.weight")

# The outer configuration of Gemma 3 on the hub leaves out whatever equals the first release's text model.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}
_GEMMA3_REFUSED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")

_DELTA_RULE = States("linear_attn.", "linear_attn.conv1d.weight", has_matrix=True)
_SHORT_CONVOLUTION = States("conv.", "conv.conv.weight", has_matrix=False)

_FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", _BOTH, _NORMS),
        Family("qwen3", "Qwen3", _BOTH, _NORMS + _QK_NORMS, head_dim=128),
        # Its configuration has no head_dim of its own in transformers, so silence means hidden size / heads.
        Family("qwen3_moe", "Qwen3 MoE", _BOTH, _NORMS + _QK_NORMS, router="mlp.gate.weight"),
        Family(
            "gemma3_text",
            "Gemma 3 (text)",
            _BOTH,
            _NORMS + _QK_NORMS + _AROUND_MLP_NORMS,
            head_dim=256,
            windows=Windows(4096, seeing_all=6, seeing_all_setting="sliding_window_pattern"),
            extra_copies=1,
            refused=_GEMMA3_REFUSED,
            defaults=_GEMMA3_DEFAULTS,
        ),
        # Windows are for all layers or, since version 0.2, for none.
        Family("mistral", "Mistral", _BOTH, _NORMS, windows=Windows(4096)),
        # Rotations are stretched, and queries grow with their position.
        Family("ministral3", "Ministral 3", _BOTH, _NORMS, head_dim=128, refused=("sliding_window",)),
        Family("qwen2", "Qwen2", _BOTH, _NORMS),
        Family("olmo2", "OLMo 2", _BOTH, _AFTER_NORMS + _QK_NORMS),
        Family("olmo3", "OLMo 3", _BOTH, _AFTER_NORMS + _QK_NORMS, windows=Windows(4096, seeing_all=4)),
        # Queries, keys and values are one matrix, gate and up another; both halves live as long as the whole.
        Family(
            "phi3",
            "Phi-3",
            _BOTH,
            _NORMS,
            attention=Attention.FUSED,
            dense_mlp=("mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
            windows=Windows(),
            extra_copies=1,
        ),
        # Norms before and behind attention and MLP.
        Family(
            "glm4",
            "GLM-4",
            _BOTH,
            (*_NORMS, "post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"),
            dense_mlp=("mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
            head_dim=128,
        ),
        Family(
            "gemma2",
            "Gemma 2",
            _BOTH,
            _NORMS + _AROUND_MLP_NORMS,
            head_dim=256,
            windows=Windows(4096, seeing_all=2),
            extra_copies=1,
            writes_scores=True,
            whole_scores=True,
            refused=("use_bidirectional_attention",),
        ),
        # Every layer has experts, as wide as `intermediate_size`, and a sink for each head.
        Family(
            "gpt_oss",
            "gpt-oss",
            _BOTH,
            (*_NORMS, "self_attn.sinks"),
            router="mlp.router.weight",
            transposed=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            expert_width="intermediate_size",
            head_dim=64,
            windows=Windows(128, seeing_all=2),
            extra_copies=5,
            writes_scores=True,
        ),
        # The first layers are dense. Behind the last one lies a layer that predicts a token further.
        Family(
            "deepseek_v3",
            "DeepSeek-V3",
            _BOTH,
            (*_NORMS, "self_attn.kv_a_layernorm.weight"),
            attention=Attention.LATENT,
            router="mlp.gate.weight",
            whole_scores=True,
            extra_layers="num_nextn_predict_layers",
        ),
        # The small ones also have an input to each layer that follows from the token, as wide as the libraries take
        # it for when the configuration is silent, and layers that attend to the keys of others.
        Family(
            "gemma4_text",
            "Gemma 4 (text)",
            _BOTH,
            _NORMS + _AROUND_MLP_NORMS,
            attention=Attention.VARIED,
            attention_norms=_QK_NORMS,
            router="router.proj.weight",
            experts_switch="enable_moe_block",
            head_dim=256,
            windows=Windows(512, seeing_all=6),
            extra_copies=1,
            ends_seeing_all=True,
            shares_keys=True,
            input_width="hidden_size_per_layer_input",
            input_tensors=_OWN_INPUT,
            defaults={"hidden_size_per_layer_input": 256},
        ),
        # Three of four layers attend within chunks; the fourth, to everything and without a rotation. Some layers have
        # experts, of which one is for all tokens.
        Family(
            "llama4_text",
            "Llama 4 (text)",
            _BOTH,
            _NORMS,
            dense_width="intermediate_size_mlp",
            dense_mlp=tuple(f"feed_forward.{name}_proj.weight" for name in ("gate", "up", "down")),
            router="feed_forward.router.weight",
            transposed=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
            expert_width="intermediate_size",
            shared_expert=True,
            head_dim=128,
            windows=Windows(
                8192,
                seeing_all=4,
                seeing_all_setting="no_rope_layer_interval",
                setting="attention_chunk_size",
                kind="chunked_attention",
                in_chunks=True,
                listed="no_rope_layers",
            ),
        ),
        # Three of four layers are gated delta rules.
        Family(
            "qwen3_next",
            "Qwen3-Next",
            _BOTH,
            _NORMS,
            attention_norms=_QK_NORMS,
            router="mlp.gate.weight",
            head_dim=256,
            states=_DELTA_RULE,
            gated_queries=True,
        ),
        Family(
            "qwen3_5_text",
            "Qwen3.5 (text)",
            _BOTH,
            _NORMS,
            attention_norms=_QK_NORMS,
            head_dim=256,
            states=_DELTA_RULE,
            gated_queries=True,
        ),
        # Every layer has experts, and its configurations give no width of a dense MLP.
        Family(
            "qwen3_5_moe_text",
            "Qwen3.5 MoE (text)",
            _BOTH,
            _NORMS,
            attention_norms=_QK_NORMS,
            router="mlp.gate.weight",
            head_dim=256,
            states=_DELTA_RULE,
            gated_queries=True,
        ),
        # Most layers are convolutions over three tokens.
        Family(
            "lfm2",
            "LFM2",
            _BOTH,
            ("operator_norm.weight", "ffn_norm.weight"),
            attention_norms=("self_attn.q_layernorm.weight", "self_attn.k_layernorm.weight"),
            attention=Attention.OUT,
            dense_mlp=("feed_forward.w1.weight", "feed_forward.w2.weight", "feed_forward.w3.weight"),
            states=_SHORT_CONVOLUTION,
        ),
    )
}
# `longrope` has two sets of rotations, for short and for long sequences. transformers changes from one to the other,
# and computes the sequence again, when its length passes the original context; mlx-lm always uses the long ones, unless
# it is given the short ones for them. So sequences end there.
_LONG_ROPE = ("longrope", "su")


def known_families() -> tuple[Family, ...]:
    """Every row of the table."""
    return tuple(_FAMILIES.values())


def family_of(config: Mapping[str, object], where: str) -> tuple[Family, Mapping[str, object]]:
    """The family, and the configuration of the text model: the nested one of a vision-language checkpoint."""
    model_type, text_config = text_model_of(config, where)
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        supported = ", ".join(f"{known.title} ({known.model_type})" for known in _FAMILIES.values() if known.engines)
        raise ModelError(
            f"{where}: the architecture {architecture_of(config)!r} (model_type {model_type!r}) is not supported; "
            f"supported are {supported}"
        )
    _refuse_settings(family, text_config, where)
    return family, text_config


def engines_for(family: Family, config: Mapping[str, object]) -> frozenset[Backend]:
    """The engines that compute a model with the text configuration `config` exactly."""
    engines = family.engines
    for setting, able in family.narrowed.items():
        if config.get(setting):
            engines &= able
    return engines


def short_context(config: Mapping[str, object]) -> int | None:
    """How long a sequence may become when its rotations are `longrope`: beyond, another set of them would hold for
    all of its positions, and what is cached already would be wrong. None for all other rotations."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in _LONG_ROPE:
        return None
    found = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return found if type(found) is int and found > 0 else None


def architecture_of(config: Mapping[str, object]) -> str:
    """The class name that the configuration gives for the model."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else config.get("model_type", "unknown")
    return first if isinstance(first, str) else "unknown"


def _refuse_settings(family: Family, config: Mapping[str, object], where: str) -> None:
    for setting in family.refused:
        if config.get(setting):
            raise ModelError(f"{where}: {setting} is {config[setting]!r}; Potluck runs {family.title} only without it")
    if sharing_layers(config) and not family.shares_keys:
        raise ModelError(f"{where}: expected {family.title} layers with keys of their own, found num_kv_shared_layers")
    kinds = config.get("layer_types") or []
    if family.ends_seeing_all and not (isinstance(kinds, list) and kinds and kinds[-1] == "full_attention"):
        raise ModelError(f"{where}: expected layer_types with full_attention as the last, found {kinds!r:.80}")
    allowed = {"full_attention"}
    allowed |= {family.windows.kind} if family.windows else set()
    allowed |= {"conv", "linear_attention"} if family.states else set()
    unknown = sorted({str(kind) for kind in kinds} - allowed) if isinstance(kinds, list) else ["?"]
    if unknown or (config.get("use_sliding_window") and not family.windows):
        found = ", ".join(unknown) or "sliding_attention"
        raise ModelError(
            f"{where}: expected {family.title} layers of kind {' or '.join(sorted(allowed))}, found {found}; "
            "Potluck does not run these"
        )
