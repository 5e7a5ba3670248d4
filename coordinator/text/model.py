"""Everything about text that a model's folder says: tokenizer, chat template, end of sequence, sampling defaults."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.errors import ModelError
from coordinator.text.template import ChatTemplate
from coordinator.text.tokenizer import Tokenizer, load_tokenizer

_TOKEN_ID_MAX: Final = (1 << 31) - 1
"""What token ids and counts of tokens may be wherever they travel."""

_REPETITION_PENALTY_MAX: Final = 1e6
"""What a step's sampling carries."""

_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the model's authors recommend where a client says nothing; without them OpenAI's defaults."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        sound = (
            0 <= self.temperature <= 100
            and 0 <= self.top_k <= _TOKEN_ID_MAX
            and 0 <= self.top_p <= 1
            and 0 <= self.min_p <= 1
            and 0 < self.repetition_penalty <= _REPETITION_PENALTY_MAX
        )
        if not sound:
            raise ModelError(f"generation_config.json recommends sampling parameters out of range: {self}")


@dataclass(frozen=True, slots=True)
class TextModel:
    """A model as far as text is concerned. `template` is None for a model that only continues texts."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: frozenset[int]
    defaults: SamplingDefaults


def load_text_model(folder: Path) -> TextModel:
    """Read a model's folder. ModelError says what is missing or damaged."""
    settings = _read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(settings)
    tokenizer = load_tokenizer(folder, frozenset(special_tokens.values()))
    source = _template_source(folder, settings)
    generation = _read_json(folder / "generation_config.json")
    return TextModel(
        tokenizer,
        None if source is None else ChatTemplate(source, special_tokens),
        _eos_ids(generation, _read_json(folder / "config.json"), tokenizer, special_tokens.get("eos_token")),
        _defaults(generation),
    )


def _read_json(path: Path) -> Mapping[str, object]:
    """A JSON object; empty when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} should hold a JSON object, found {type(value).__name__}")
    return value


def _special_tokens(settings: Mapping[str, object]) -> dict[str, str]:
    """bos_token and so on: written as a string, or as an object with the string in `content`."""
    found = {}
    for name in _SPECIAL:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _template_source(folder: Path, settings: Mapping[str, object]) -> str | None:
    """A file of its own comes first, then tokenizer_config.json (one template, or several of which `default` is for
    plain chats), then the file that multimodal models used to have."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
    source = settings.get("chat_template", _read_json(folder / "chat_template.json").get("chat_template"))
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise ModelError(f"the chat template in {folder} should be text, found {type(source).__name__}")
    return source


def _eos_ids(
    generation: Mapping[str, object], config: Mapping[str, object], tokenizer: Tokenizer, eos_token: str | None
) -> frozenset[int]:
    """generation_config.json knows best, else config.json; the tokenizer's own end of sequence always counts, because
    chat models end with it where the configuration still names the base model's."""
    nested = config.get("text_config")
    sources = [generation, config, nested if isinstance(nested, dict) else {}]
    value: object = next((source["eos_token_id"] for source in sources if source.get("eos_token_id") is not None), [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) and 0 <= id <= _TOKEN_ID_MAX for id in ids):
        raise ModelError(f"eos_token_id should be one or several token ids, found {value!r:.80}")
    own = tokenizer.id_of(eos_token) if eos_token is not None else None
    return frozenset(ids) | ({own} if own is not None else frozenset())


def _defaults(generation: Mapping[str, object]) -> SamplingDefaults:
    """Recommended sampling parameters. `top_k` may be written as -1 for off; `do_sample: false` recommends the
    likeliest token, which is a temperature of 0."""
    numbers = {
        name: _number(name, value)
        for name in SamplingDefaults.__dataclass_fields__
        if (value := generation.get(name)) is not None
    }
    top_k = numbers.pop("top_k", 0.0)
    if not top_k.is_integer():
        raise ModelError(f"generation_config.json: top_k should be a whole number, found {top_k}")
    do_sample = generation.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise ModelError(f"generation_config.json: do_sample should be true or false, found {do_sample!r:.80}")
    if do_sample is False:
        numbers["temperature"] = 0.0
    return SamplingDefaults(top_k=max(0, int(top_k)), **numbers)


def _number(name: str, value: object) -> float:
    """Python reads Infinity and NaN as JSON too, and whole numbers of any length."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ModelError(f"generation_config.json: {name} should be a number, found {value!r:.80}")
