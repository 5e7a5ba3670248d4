"""What a request's fields mean: types, ranges, defaults, and which values of unsupported fields ask for nothing."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.errors import RequestError
from cluster.limits import BATCH_TIMEOUT_S, CHOICES_MAX, STOP_CHARS_MAX, STOPS_MAX
from cluster.steps import Sampling
from coordinator.api.fields import Fields, checked_text, shown
from coordinator.deadlines import Limit
from coordinator.lanes import Lane
from coordinator.text.model import SamplingDefaults

COMPLETION_TOKENS_DEFAULT: Final = 16
"""OpenAI's max_tokens of /v1/completions where a client gives none; chats go on until the context is full."""

_INT32_MAX: Final = 2**31 - 1
_SEED_MIN, _SEED_MAX = -(2**63), 2**63 - 1

_LANE_OF_TIER: Final = {
    "auto": Lane.INTERACTIVE,
    "default": Lane.INTERACTIVE,
    "priority": Lane.INTERACTIVE,
    "fast": Lane.INTERACTIVE,
    "scale": Lane.INTERACTIVE,
    "flex": Lane.BATCH,
    "batch": Lane.BATCH,
}
"""OpenAI's tiers; `auto` leaves it to us, so it contradicts nothing."""

Neutral = Mapping[str, Sequence[object]]

_NEUTRAL: Final[Neutral] = {
    "logit_bias": ({},),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "use_beam_search": (False,),
}
NEUTRAL_IN_CHATS: Final[Neutral] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools both mean none
    "parallel_tool_calls": (True, False),  # says something about tools only
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "verbosity": ("medium",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
NEUTRAL_IN_COMPLETIONS: Final[Neutral] = {"echo": (False,), "suffix": ("",), "add_special_tokens": (True,)}


@dataclass(frozen=True, slots=True)
class Options:
    """What chats and completions have in common."""

    model: str | None
    sampling: Sampling
    n: int
    max_tokens: int | None
    max_tokens_field: str  # the name that the client used
    min_tokens: int
    ignore_eos: bool
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    lane: Lane
    timeouts_s: Mapping[Limit, float]


def read_options(fields: Fields, defaults: SamplingDefaults, *, chat: bool) -> Options:
    """Read everything but the messages or the prompt, and refuse what is left in `fields`."""
    max_tokens, max_tokens_field = _read_max_tokens(fields, chat)
    n = fields.integer("n", 1, CHOICES_MAX) or 1
    stream = fields.flag("stream")
    options = Options(
        model=fields.text("model"),
        sampling=_read_sampling(fields, defaults),
        n=n,
        max_tokens=max_tokens,
        max_tokens_field=max_tokens_field,
        min_tokens=fields.integer("min_tokens", 0, _INT32_MAX) or 0,
        ignore_eos=fields.flag("ignore_eos"),
        stops=_read_stops(fields),
        stream=stream,
        include_usage=_read_include_usage(fields, stream),
        return_token_ids=fields.flag("return_token_ids"),
        lane=_read_lane(fields),
        timeouts_s=_read_timeouts(fields),
    )
    # These name the client's own user or cache bucket; they ask for nothing here.
    for label in ("user", "safety_identifier", "prompt_cache_key"):
        fields.text(label)
    fields.neutral(_NEUTRAL)
    fields.neutral(NEUTRAL_IN_CHATS if chat else {**NEUTRAL_IN_COMPLETIONS, "best_of": (n,)})
    fields.finish()
    if max_tokens is not None and options.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {options.min_tokens}, more than {max_tokens_field} ({max_tokens})", field="min_tokens"
        )
    return options


def _read_max_tokens(fields: Fields, chat: bool) -> tuple[int | None, str]:
    """In chats max_completion_tokens is the newer name of max_tokens."""
    old = fields.integer("max_tokens", 1, _INT32_MAX)
    if not chat:
        return (COMPLETION_TOKENS_DEFAULT if old is None else old), "max_tokens"
    new = fields.integer("max_completion_tokens", 1, _INT32_MAX)
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens ({old}) and max_completion_tokens ({new}) say different things; send one of them",
            field="max_completion_tokens",
        )
    return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


def _read_sampling(fields: Fields, defaults: SamplingDefaults) -> Sampling:
    """The client's values, else the model's recommendations. Without a seed every request draws its own."""

    def number(field: str, low: float, high: float, default: float, *, above: bool = False) -> float:
        value = fields.number(field, low, high, above=above)
        return default if value is None else value

    seed = fields.integer("seed", _SEED_MIN, _SEED_MAX)
    top_k = fields.integer("top_k", -1, _INT32_MAX)  # vLLM's -1 and 0 are both off
    return Sampling(
        seed=secrets.randbits(63) if seed is None else seed,
        temperature=number("temperature", 0, 2, defaults.temperature),
        top_k=defaults.top_k if top_k is None else max(0, top_k),
        top_p=number("top_p", 0, 1, defaults.top_p),
        min_p=number("min_p", 0, 1, defaults.min_p),
        presence_penalty=number("presence_penalty", -2, 2, 0.0),
        frequency_penalty=number("frequency_penalty", -2, 2, 0.0),
        repetition_penalty=number("repetition_penalty", 0, 10, defaults.repetition_penalty, above=True),
    )


def _read_stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    if not isinstance(value, (str, list)):
        fields.fail("stop", "a string or a list of strings", value)
    stops = value if isinstance(value, list) else [value]
    if len(stops) > STOPS_MAX:
        fields.fail("stop", f"a list of at most {STOPS_MAX} strings", value)
    texts = tuple(checked_text(stop, "stop") for stop in stops)
    if not all(1 <= len(text) <= STOP_CHARS_MAX for text in texts):
        fields.fail("stop", f"strings of 1 to {STOP_CHARS_MAX} characters", max(texts, key=len) if all(texts) else "")
    return texts


def _read_lane(fields: Fields) -> Lane:
    """`priority` is our word for it, `service_tier` OpenAI's."""
    priority = fields.one_of("priority", list(Lane))
    tier = fields.one_of("service_tier", list(_LANE_OF_TIER))
    lane = None if priority is None else Lane(priority)
    if tier is not None and tier != "auto" and lane not in (None, _LANE_OF_TIER[tier]):
        raise RequestError(
            f"priority ({priority}) and service_tier ({tier}) say different things; send one of them", field="priority"
        )
    return lane or _LANE_OF_TIER[tier or "auto"]


def _read_timeouts(fields: Fields) -> dict[Limit, float]:
    wishes = {limit: fields.number(limit.field, 0, BATCH_TIMEOUT_S, above=True) for limit in Limit}
    return {limit: seconds for limit, seconds in wishes.items() if seconds is not None}


def _read_include_usage(fields: Fields, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    if not stream:
        raise RequestError("stream_options goes with stream: true only", field="stream_options")
    options = Fields(value, "stream_options")
    include_usage = options.flag("include_usage")
    options.neutral({"include_obfuscation": (False,), "continuous_usage_stats": (False,)})
    options.finish()
    return include_usage


def read_prompts(fields: Fields, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of texts, a list of token ids, or a list of such lists; texts still have to be tokenised."""
    value = fields.take("prompt")
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(checked_text(item, "prompt") for item in value)
        lists = value if all(isinstance(item, list) for item in value) else [value]
        return tuple(_token_ids(item, vocab_size) for item in lists)
    if not isinstance(value, str):
        fields.fail("prompt", "a text, a list of texts, a list of token ids or a list of such lists", value)
    return (checked_text(value, "prompt"),)


def _token_ids(value: list[object], vocab_size: int) -> tuple[int, ...]:
    ids = []
    for id in value:
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < vocab_size:
            raise RequestError(
                f"token ids in prompt must be integers from 0 to {vocab_size - 1}, found {shown(id)}", field="prompt"
            )
        ids.append(id)
    return tuple(ids)
