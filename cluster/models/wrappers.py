"""Vision-language checkpoints: where the configuration of their text model is, and whose text model it is.

Owns: the wrappers that Potluck looks into. Knows no family; whether the text model's is supported says
`cluster.models.families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cluster.errors import ModelError

# A wrapper's own model type, and the one that its text_config has when it does not say.
WRAPPERS: Final = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}

# Text models that are another's, but for rotations that also follow where in time and in a picture a token is. For text
# all of these are its position.
_ALIKE = {"qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
_PLACES = ("mrope_section", "mrope_interleaved")
# As published first, these have the settings of their text model beside those of vision.
_FLAT = ("qwen2_5_vl",)


def text_model_of(config: Mapping[str, object], where: str) -> tuple[object, Mapping[str, object]]:
    """The model type of the text model, and its configuration: the nested one of a vision-language checkpoint."""
    model_type = config.get("model_type")
    text_config: Mapping[str, object] = config
    if isinstance(model_type, str) and model_type in WRAPPERS:
        nested = config.get("text_config", config if model_type in _FLAT else None)
        if not isinstance(nested, dict):
            raise ModelError(f"{where}: expected text_config in a {model_type} configuration, found none")
        inner = nested.get("model_type")
        text_config, model_type = nested, WRAPPERS[model_type] if inner in (None, model_type) else inner
    if isinstance(model_type, str) and model_type in _ALIKE:
        text_config, model_type = _of_text_alone(text_config), _ALIKE[model_type]
    return model_type, text_config


def _of_text_alone(config: Mapping[str, object]) -> Mapping[str, object]:
    """Rotations by a token's position alone, in either spelling."""
    changed: dict[str, object] = {}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(rotation := config.get(name), dict):
            kept = {setting: value for setting, value in rotation.items() if setting not in _PLACES}
            kept |= {key: "default" for key in ("type", "rope_type") if kept.get(key) == "mrope"}
            changed[name] = kept if kept.keys() - {"type", "rope_type"} else None
    return {**config, **changed}
