"""The architectures that Potluck converts from GGUF, and what it must know of each.

Owns: the one table keyed by `general.architecture`: which family it becomes, its tensors' names there, what a
converter did to its values, and its configuration. Other architectures are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from cluster.errors import ModelError
from cluster.models.shape import LAYERS_MAX
from cluster.types import DType
from coordinator.gguf.rotation import longrope, scaling
from coordinator.gguf.source import GgufFiles

Config = dict[str, object]
"""Fields of a config.json."""

_ENDS: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AROUND_NORMS: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS: Final = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
_GPT_OSS: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_sinks": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
COMPUTED: Final = frozenset({"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"})
"""Tensors that say how positions rotate; they become settings."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What holds for every model of one `general.architecture`."""

    name: str
    title: str
    configure: Callable[[GgufFiles], Config]
    layer: Mapping[str, str]  # names of a layer's tensors, without .weight and .bias
    ends: Mapping[str, str] = field(default_factory=lambda: _ENDS)
    bare: frozenset[str] = frozenset()  # tensors that are called neither weight nor bias there
    pairs_neighbours: bool = False  # rows of queries and keys are in the order of rotations that pair neighbours
    adds_one: bool = False  # norms are stored with the one that the model adds to them
    dtype: DType = DType.F16  # what packed models compute in: the type of GGUF's own scales

    def heads(self, files: GgufFiles, tensor: str) -> int:
        """How many heads the rows of `tensor` are, if their order has to be undone; else 0."""
        if not self.pairs_neighbours or tensor not in ("attn_q", "attn_k"):
            return 0
        heads = files.facts.same(f"{self.name}.attention.head_count")
        return heads if tensor == "attn_q" else files.facts.same(f"{self.name}.attention.head_count_kv", heads)


def architecture_of(files: GgufFiles) -> Architecture:
    kind = files.facts.text("general.type", "model")
    if kind != "model":
        raise ModelError(f"{files.facts.where}: holds no model but its {kind!r:.40}; name the model's own file")
    name = files.facts.text("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(f"{known.title} ({known.name})" for known in ARCHITECTURES.values())
        raise ModelError(
            f"{files.facts.where}: the architecture {name!r:.40} is not converted from GGUF; converted are {known}. "
            "Use a version of this model in safetensors"
        )
    return ARCHITECTURES[name]


def _settings(files: GgufFiles, name: str, model_type: str, class_name: str, whole: bool = True) -> Config:
    """What every configuration has. `whole`: all dimensions of a head are rotated."""
    facts = files.facts
    hidden, heads = facts.integer(f"{name}.embedding_length"), facts.same(f"{name}.attention.head_count", least=1)
    head_dim = facts.integer(f"{name}.attention.key_length", hidden // heads, least=1)
    for key in ("attention.value_length", *(("rope.dimension_count",) if whole else ())):
        if (found := facts.integer(f"{name}.{key}", head_dim)) != head_dim:
            raise ModelError(f"{facts.where}: {name}.{key} is {found}; Potluck converts only {head_dim}, a whole head")
    if not facts.flag(f"{name}.attention.causal", True):
        raise ModelError(f"{facts.where}: attends to what comes later, so it is no model that writes text")
    facts.raw(f"{name}.vocab_size")  # the embedding's own rows count
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden,
        # Lists with an item for each layer are made of it, so the check that every model passes would come too late.
        "num_hidden_layers": facts.integer(f"{name}.block_count", least=1, most=LAYERS_MAX),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.same(f"{name}.attention.head_count_kv", heads, least=1),
        "head_dim": head_dim,
        "max_position_embeddings": facts.integer(f"{name}.context_length"),
        "rms_norm_eps": facts.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in files.tensors,
        "hidden_act": "silu",
    }


def _rotated(files: GgufFiles, name: str, config: Config) -> Config:
    head_dim = config["head_dim"]
    assert isinstance(head_dim, int)
    theta = files.facts.number(f"{name}.rope.freq_base", 10_000.0)
    stretched = scaling(files, name, head_dim) or {"rope_type": "default"}
    return {**config, "rope_parameters": {**stretched, "rope_theta": theta}}


def _dense(files: GgufFiles, name: str) -> Config:
    return {"intermediate_size": files.facts.same(f"{name}.feed_forward_length")}


def _llama(files: GgufFiles) -> Config:
    if files.facts.integer("llama.expert_count", 0):
        raise ModelError(f"{files.facts.where}: is a mixture of experts as Mixtral has it, which Potluck does not run")
    window = files.facts.integer("llama.attention.sliding_window", 0)
    # Mistral's models are written as Llama's; only a window tells them apart, and without one they are the same.
    named = ("mistral", "MistralForCausalLM") if window else ("llama", "LlamaForCausalLM")
    config = _settings(files, "llama", *named) | _dense(files, "llama")
    config |= {"sliding_window": window} if window else {"mlp_bias": False}
    config["attention_bias"] = "blk.0.attn_q.bias" in files.tensors
    return _rotated(files, "llama", config)


def _qwen2(files: GgufFiles) -> Config:
    config = _settings(files, "qwen2", "qwen2", "Qwen2ForCausalLM") | _dense(files, "qwen2")
    return _rotated(files, "qwen2", config | {"use_sliding_window": False})


def _qwen3(files: GgufFiles) -> Config:
    config = _settings(files, "qwen3", "qwen3", "Qwen3ForCausalLM") | _dense(files, "qwen3")
    return _rotated(files, "qwen3", config | {"attention_bias": False, "use_sliding_window": False})


def _qwen3moe(files: GgufFiles) -> Config:
    facts, name = files.facts, "qwen3moe"
    config = _settings(files, name, "qwen3_moe", "Qwen3MoeForCausalLM") | {
        # No layer is dense, so this width counts nowhere; some converters leave it out.
        "intermediate_size": facts.same(f"{name}.feed_forward_length", facts.integer(f"{name}.embedding_length")),
        "moe_intermediate_size": facts.integer(f"{name}.expert_feed_forward_length"),
        "num_experts": facts.integer(f"{name}.expert_count"),
        "num_experts_per_tok": facts.integer(f"{name}.expert_used_count"),
        "norm_topk_prob": True,  # of every model of this architecture; the format has no word for it
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "use_sliding_window": False,
    }
    return _rotated(files, name, config)


def _gemma(files: GgufFiles, name: str, model_type: str, class_name: str, divided: int) -> Config:
    """`divided`: the number of layers of the model whose queries are divided by the root of hidden size / heads."""
    config = _settings(files, name, model_type, class_name) | _dense(files, name)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    assert isinstance(hidden, int)
    assert isinstance(heads, int)
    del config["hidden_act"]
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": files.facts.integer(f"{name}.attention.sliding_window"),
        "query_pre_attn_scalar": hidden // heads if config["num_hidden_layers"] == divided else config["head_dim"],
    }


def _gemma2(files: GgufFiles) -> Config:
    config = _gemma(files, "gemma2", "gemma2", "Gemma2ForCausalLM", divided=46) | {
        "attn_logit_softcapping": files.facts.number("gemma2.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": files.facts.number("gemma2.final_logit_softcapping", 30.0),
    }
    return _rotated(files, "gemma2", config)


def _gemma3(files: GgufFiles) -> Config:
    facts = files.facts
    config = _gemma(files, "gemma3", "gemma3_text", "Gemma3ForCausalLM", divided=62)
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    assert isinstance(layers, int)
    assert isinstance(head_dim, int)
    everywhere = scaling(files, "gemma3", head_dim) or {"rope_type": "default"}
    return config | {
        "layer_types": _kinds(facts.raw("gemma3.attention.sliding_window_pattern"), 6, layers, facts.where),
        "rope_parameters": {
            "full_attention": {**everywhere, "rope_theta": facts.number("gemma3.rope.freq_base", 1_000_000.0)},
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": facts.number("gemma3.rope.freq_base_swa", 10_000.0),
            },
        },
    }


def _kinds(pattern: object, silent: int, layers: int, where: str) -> list[str]:
    """Which layers have a window: all but each n-th (`silent` where nothing is stated), or as listed."""
    if isinstance(pattern, tuple) and len(pattern) == layers:
        windowed = [bool(item) for item in pattern]
    elif pattern is None or (type(pattern) is int and pattern > 0):
        period = pattern if isinstance(pattern, int) else silent
        windowed = [(layer + 1) % period != 0 for layer in range(layers)]
    else:
        raise ModelError(
            f"{where}: expected a period or {layers} items as sliding_window_pattern, found {pattern!r:.60}"
        )
    return ["sliding_attention" if has_window else "full_attention" for has_window in windowed]


def _phi3(files: GgufFiles) -> Config:
    facts, name = files.facts, "phi3"
    config = _settings(files, name, "phi3", "Phi3ForCausalLM", whole=False) | _dense(files, name)
    head_dim = config["head_dim"]
    assert isinstance(head_dim, int)
    stretched, original = longrope(files, name)
    rotation = stretched or {"rope_type": "default"}
    rotation["rope_theta"] = facts.number(f"{name}.rope.freq_base", 10_000.0)
    if (rotated := facts.integer(f"{name}.rope.dimension_count", head_dim)) != head_dim:
        rotation["partial_rotary_factor"] = rotated / head_dim
    if original is not None:
        rotation["original_max_position_embeddings"] = config["original_max_position_embeddings"] = original
    # Converters write 0 for none.
    window = facts.integer(f"{name}.attention.sliding_window", 0)
    return config | {"rope_parameters": rotation, "sliding_window": window or None}


def _gpt_oss(files: GgufFiles) -> Config:
    facts, name = files.facts, "gpt-oss"
    config = _settings(files, name, "gpt_oss", "GptOssForCausalLM")
    layers = config["num_hidden_layers"]
    assert isinstance(layers, int)
    facts.raw(f"{name}.feed_forward_length")  # no layer is dense
    config |= {
        "intermediate_size": facts.integer(f"{name}.expert_feed_forward_length"),
        "num_local_experts": facts.integer(f"{name}.expert_count"),
        "num_experts_per_tok": facts.integer(f"{name}.expert_used_count"),
        "sliding_window": facts.integer(f"{name}.attention.sliding_window"),
        "layer_types": _kinds(facts.raw(f"{name}.attention.sliding_window_pattern"), 2, layers, facts.where),
        "attention_bias": True,
        "swiglu_limit": 7.0,
    }
    config = _rotated(files, name, config)
    rotation = config["rope_parameters"]
    assert isinstance(rotation, dict)
    if rotation["rope_type"] == "yarn":
        # The ramp of every gpt-oss begins and ends between dimensions.
        rotation |= {"beta_fast": 32.0, "beta_slow": 1.0, **rotation, "truncate": False}
    return config


ARCHITECTURES: Final = {
    known.name: known
    for known in (
        Architecture("llama", "Llama and Mistral", _llama, _LAYER, pairs_neighbours=True),
        Architecture("qwen2", "Qwen2", _qwen2, _LAYER),
        Architecture("qwen3", "Qwen3", _qwen3, _LAYER | _QK_NORMS),
        Architecture("qwen3moe", "Qwen3 MoE", _qwen3moe, _LAYER | _QK_NORMS | _EXPERTS),
        # Gemma's activations leave the range of float16.
        Architecture("gemma2", "Gemma 2", _gemma2, _LAYER | _AROUND_NORMS, adds_one=True, dtype=DType.BF16),
        Architecture("gemma3", "Gemma 3", _gemma3, _LAYER | _QK_NORMS | _AROUND_NORMS, adds_one=True, dtype=DType.BF16),
        # Published in bfloat16, whose range its activations use.
        Architecture("gpt-oss", "gpt-oss", _gpt_oss, _GPT_OSS, bare=frozenset({"attn_sinks"}), dtype=DType.BF16),
        Architecture(
            "phi3",
            "Phi-3",
            _phi3,
            _LAYER | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        ),
    )
}
