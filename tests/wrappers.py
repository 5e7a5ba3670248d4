"""Vision-language checkpoints around the tests' text models: real classes of transformers, saved as these save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TOWER: dict[str, object] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_TOWER: dict[str, object] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
}

WRAPPED: dict[str, str] = {
    "gemma3": "gemma3",
    "gemma4": "gemma4_small",
    "llama4": "llama4",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe",
}
"""A wrapper's model type, and the family of checkpoints that it is put around."""

_TOWERS: dict[str, dict[str, object]] = {
    "gemma3": _TOWER,
    "gemma4": _TOWER,
    "llama4": _TOWER | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    "mistral3": _TOWER | {"model_type": "pixtral"},
    "qwen2_5_vl": _QWEN_TOWER,
    "qwen3_vl": _QWEN_TOWER | {"deepstack_visual_indexes": [0]},
    "qwen3_5": _QWEN_TOWER,
    "qwen3_5_moe": _QWEN_TOWER,
}

_SECTIONS = {"qwen2_5_vl": [4, 2, 2], "qwen3_vl": [4, 2, 2]}
"""How many pairs of a head's dimensions follow from where in time, in height and in width a token is."""


def wrap(wrapper: str, text_folder: Path, folder: Path) -> Path:
    """Save a checkpoint of `wrapper` in `folder`, with the text model in `text_folder` and a random vision tower."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    text_config: dict[str, Any] = json.loads((text_folder / "config.json").read_text())
    if sections := _SECTIONS.get(wrapper):
        text_config["model_type"] = f"{wrapper}_text"
        text_config["rope_parameters"] |= {"mrope_section": sections}
    config = AutoConfig.for_model(
        wrapper,
        text_config=text_config,
        vision_config=_TOWERS[wrapper],
        tie_word_embeddings=text_config["tie_word_embeddings"],
    )
    torch.manual_seed(0)
    whole: Any = AutoModelForImageTextToText.from_config(config)
    text: Any = AutoModelForCausalLM.from_pretrained(text_folder, local_files_only=True)
    inner = whole if hasattr(whole, "model") else whole.language_model  # Llama 4 holds a whole text model
    (inner.model.language_model if inner is whole else inner.model).load_state_dict(text.model.state_dict())
    inner.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(folder)
    return folder


def flatten(folder: Path) -> None:
    """As Qwen2.5-VL was published: the text model's settings lie beside those of vision."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    text = config.pop("text_config")
    rotation = text.pop("rope_parameters")
    text["rope_theta"] = rotation["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rotation["mrope_section"]}
    path.write_text(json.dumps(text | config))


def wrap_packed(wrapper: str, text_folder: Path, packed: Path, folder: Path) -> Path:
    """The same with the text model as it is in `packed`. MLX's tools put `language_model.` before its names; others
    leave them as they are in full precision. None of them packs the tower."""
    from safetensors.torch import load_file, save_file

    path = wrap(wrapper, text_folder, folder) / "model.safetensors"
    stated: dict[str, Any] = json.loads((packed / "config.json").read_text())
    whole = load_file(path)
    body = next(name.partition("layers.0.")[0] for name in whole if name.endswith("layers.0.input_layernorm.weight"))
    head = next((name.partition("lm_head.")[0] for name in whole if "lm_head." in name), "")
    tower = {name: tensor for name, tensor in whole.items() if not name.startswith((body, f"{head}lm_head."))}
    if "quantization" in stated:
        body, head = "language_model.model.", "language_model."

    def wrapped(name: str) -> str:
        bare = name.removeprefix("language_model.")
        return f"{body}{bare.removeprefix('model.')}" if bare.startswith("model.") else f"{head}{bare}"

    text = {wrapped(name): tensor for name, tensor in load_file(packed / "model.safetensors").items()}
    save_file(tower | text, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for key in stated.keys() & {"quantization", "quantization_config"}:
        config[key] = {
            wrapped(name) if isinstance(value, dict) and "layers." in name else name: value
            for name, value in stated[key].items()
        }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
