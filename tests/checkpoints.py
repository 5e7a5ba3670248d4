"""Tiny random checkpoints of the supported families, for tests: real files, real names, a real tokenizer.

The weights are scaled so that greedy continuations wander over many ids and the best id wins clearly: a test
that compares with such a model can fail. Special tokens never win by themselves, so a continuation ends only
where a test asks for it (override `eos_token_id` with an ordinary id to see a sequence end).
"""

from __future__ import annotations

import itertools
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.checkpoint_fields import FIELDS

FAMILIES = ("llama", "qwen3", "qwen3_moe", "gemma3")
"""What both engines ran first; every test of an engine runs on these."""

MORE_FAMILIES = (
    "mistral",
    "ministral3",
    "qwen2",
    "olmo2",
    "olmo3",
    "phi3",
    "glm4",
    "gemma2",
    "gpt_oss",
    "deepseek_v3",
    "gemma4",
    "gemma4_small",
    "llama4",
)
"""Each adds a mechanism or a naming; shorter tests run on these."""

STATE_FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "lfm2")
"""These keep a state of fixed size in most layers, so a sequence is cut back to snapshots."""

_NAMES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "ministral3": ("ministral3", "Ministral3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
    "olmo3": ("olmo3", "Olmo3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "glm4": ("glm4", "Glm4ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "qwen3_next": ("qwen3_next", "Qwen3NextForCausalLM"),
    "qwen3_5": ("qwen3_5_text", "Qwen3_5ForCausalLM"),
    "lfm2": ("lfm2", "Lfm2ForCausalLM"),
    "llama4": ("llama4_text", "Llama4ForCausalLM"),
    "gemma4": ("gemma4_text", "Gemma4ForCausalLM"),
    "gemma4_small": ("gemma4_text", "Gemma4ForCausalLM"),
    "qwen3_5_moe": ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
}

VOCABULARY = 384
SPECIALS = ("<|pad|>", "<|begin|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
PAD, BEGIN, END = SPECIALS.index("<|pad|>"), SPECIALS.index("<|begin|>"), SPECIALS.index("<|end|>")

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_checkpoint(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 6,
    dtype: str = "float32",
    shards: int = 1,
    **overrides: object,
) -> Path:
    """Save a random checkpoint of `family` in `folder`. Overrides are configuration fields of that family;
    `shards` above one gives several files and an index (about that many: tensors are never split)."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = _config(family, layers, overrides)
    config.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu").to(torch.float32)
    _fill(model, config, seed)
    model = model.to(config.dtype).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=2 * weight_bytes if shards == 1 else -(-weight_bytes // shards))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Save the tests' tokenizer: byte-level BPE that covers all of UTF-8, with a chat template."""
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    special = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): {"content": text, **special} for i, text in enumerate(SPECIALS)},
        "bos_token": SPECIALS[BEGIN],
        "eos_token": SPECIALS[END],
        "pad_token": SPECIALS[PAD],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _config(family: str, layers: int, overrides: dict[str, object]) -> Any:
    from transformers import AutoConfig

    fields: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},  # nobody's default: losing it must show
        "tie_word_embeddings": False,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    if family in FIELDS:
        fields |= FIELDS[family](layers, overrides)
    model_type, architecture = _NAMES[family]
    config = AutoConfig.for_model(model_type, **(fields | overrides))
    config.architectures = [architecture]
    return config


def _fill(model: Any, config: Any, seed: int) -> None:
    """Give every parameter values that keep activations near one and make the logits wide."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    around_zero = config.model_type in ("gemma2", "gemma3_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    unscaled = config.model_type == "gemma4_text"  # its queries are not divided by the root of their size
    stored = model.state_dict()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
    for name, parameter in sorted([*model.named_parameters(), *buffers], key=lambda named: str(named[0])):
        values = torch.empty(parameter.shape, dtype=torch.float32).normal_(generator=generator)
        # Gemma's norms, and most of these Qwens', multiply by (1 + weight).
        gemma = around_zero and not name.endswith("linear_attn.norm.weight")
        if parameter.ndim == 1 and name.endswith("norm.weight"):
            # Wide queries and keys make attention pick positions.
            centre = (0.6 if unscaled else 1.6) if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            values = values * 0.1 + centre - (1.0 if gemma else 0.0)
            if name in ("model.norm.weight", "model.embedding_norm.weight"):
                # Wide logits under a tied head as well. Its signs are random there: a hidden state that still
                # resembles its own input's embedding would otherwise draw that input again and again.
                signs = torch.ones_like(values)
                if config.tie_word_embeddings:
                    signs = torch.where(torch.rand(values.shape, generator=generator) < 0.5, -1.0, 1.0)
                values = (values + (1.0 if gemma else 0.0)) * 12.0 * signs - (1.0 if gemma else 0.0)
        elif name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
            values = values * 0.1 + 1.0
        elif name.endswith("A_log"):
            values = values * 0.1 - 3.0  # a memory that lasts for tens of tokens
        elif name.endswith("sinks"):
            values = values + 2.0  # as heavy as several of a short prompt's tokens together
        elif parameter.ndim == 1:
            values = values * 0.1  # biases
        elif "embed_tokens" in name:
            # A tied head must not simply repeat its input, so embeddings stay small beside what the layers add.
            values = values * (0.1 if config.tie_word_embeddings else 1.0)
        elif "lm_head" in name:
            values = values * 0.1
        else:
            gain = 1.6 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.2
            values = values * gain * parameter.shape[-1] ** -0.5
        if name in ("lm_head.weight", "model.embed_tokens.weight") and (
            config.tie_word_embeddings or name == "lm_head.weight"
        ):
            values[: len(SPECIALS)] *= 0.05
        with torch.no_grad():
            parameter.copy_(values)
    model.tie_weights()


@lru_cache(maxsize=1)
def _tokenizer_json() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return str(tokenizer.to_str())


def _text() -> list[str]:
    """A few hundred plain sentences with enough different words to fill the vocabulary."""
    people = ("Ada", "the neighbour", "a small cluster", "every machine", "our kitchen", "the last stage")
    verbs = ("brings", "holds", "shares", "counts", "answers with", "remembers")
    things = ("seven layers", "warm bread", "a long letter", "green apples", "the first token", "cold water")
    places = ("in the morning", "near the river", "on Monday", "without a word", "for everyone", "at home")
    parts = itertools.product(people, verbs, things, places)
    return [f"{person} {verb} {thing} {place}." for person, verb, thing, place in parts]
