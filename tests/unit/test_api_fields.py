"""coordinator/api/fields.py and schema.py: every field is understood or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import RequestError
from coordinator.api.fields import Fields
from coordinator.api.messages import read_messages
from coordinator.api.schema import Options, read_options, read_prompts
from coordinator.deadlines import Limit
from coordinator.text.model import SamplingDefaults


def options(*, chat: bool = True, defaults: SamplingDefaults | None = None, **body: object) -> Options:
    return read_options(Fields(body), defaults or SamplingDefaults(), chat=chat)


def refused(*, chat: bool = True, **body: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        options(chat=chat, **body)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1), ("temperature", -0.1), ("temperature", "hot"), ("temperature", True),
        ("temperature", 1e999), ("temperature", 10**400),
        ("top_p", 1.01), ("top_p", -1), ("min_p", 2), ("top_k", -2), ("top_k", 1.5),
        ("presence_penalty", 2.5), ("frequency_penalty", -3), ("repetition_penalty", 0), ("repetition_penalty", 11),
        ("seed", 2**63), ("seed", "1"), ("seed", 0.5), ("n", 0), ("n", 17), ("n", True), ("max_tokens", 0),
        ("max_tokens", -1), ("max_completion_tokens", 0), ("min_tokens", -1), ("ignore_eos", 1), ("stream", "true"),
        ("return_token_ids", "yes"), ("stop", ""), ("stop", ["a", ""]), ("stop", 3), ("stop", ["a"] * 17),
        ("stop", ["x" * 513]), ("stop", [3]), ("stop", "\ud800"), ("model", 3), ("user", 3), ("user", ["a"]),
        ("priority", "high"), ("priority", 1), ("timeout", 0), ("timeout", "5s"), ("timeout", 1e6),
        ("queue_timeout", 0), ("first_token_timeout", "5s"), ("token_timeout", -1),
    ],
)  # fmt: skip
def test_a_value_out_of_type_or_range_names_its_field(field: str, value: object) -> None:
    assert refused(**{field: value}).field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]), ("tool_choice", "required"), ("tool_choice", {"type": "function"}),
        ("functions", [{"name": "f"}]), ("response_format", {"type": "json_object"}), ("logprobs", True),
        ("top_logprobs", 5), ("logit_bias", {"5": 1}), ("modalities", ["text", "audio"]), ("audio", {"voice": "x"}),
        ("prediction", {"type": "content"}), ("store", True), ("service_tier", "turbo"), ("metadata", {"a": "b"}),
        ("reasoning_effort", "low"), ("verbosity", "low"), ("web_search_options", {}), ("chat_template", "x"),
        ("chat_template_kwargs", {"a": 1}), ("guided_json", "{}"), ("stop_token_ids", [1]), ("echo", True),
        ("best_of", 1), ("suffix", "x"), ("temprature", 1), ("messages2", []),
    ],
)  # fmt: skip
def test_an_unsupported_or_unknown_field_of_a_chat_is_refused_by_name(field: str, value: object) -> None:
    error = refused(**{field: value})
    assert error.field == field
    assert field in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [("echo", True), ("best_of", 2), ("suffix", "x"), ("logprobs", 0), ("logprobs", 5), ("tools", []),
     ("max_completion_tokens", 5), ("messages", [])],
)  # fmt: skip
def test_an_unsupported_field_of_a_completion_is_refused_by_name(field: str, value: object) -> None:
    assert refused(chat=False, **{field: value}).field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []), ("tool_choice", "auto"), ("tool_choice", "none"), ("functions", []),
        ("response_format", {"type": "text"}), ("logprobs", False), ("top_logprobs", 0), ("logit_bias", {}),
        ("modalities", ["text"]), ("store", False), ("service_tier", "auto"), ("metadata", {}), ("user", "me"),
        ("safety_identifier", "x"), ("prompt_cache_key", "x"), ("tools", None), ("no_such_field", None), ("stop", []),
        ("skip_special_tokens", True), ("add_generation_prompt", True), ("parallel_tool_calls", True),
    ],
)  # fmt: skip
def test_a_value_that_asks_for_nothing_is_accepted(field: str, value: object) -> None:
    plain, with_field = options(seed=1), options(seed=1, **{field: value})
    assert plain == with_field


def test_zero_is_not_false() -> None:
    """JSON tells them apart, Python does not."""
    assert refused(logprobs=0).field == "logprobs"
    assert refused(top_logprobs=False).field == "top_logprobs"


def test_best_of_n_of_n_is_what_happens_anyway() -> None:
    assert options(chat=False, n=3, best_of=3).n == 3
    assert refused(chat=False, n=3, best_of=4).field == "best_of"


def test_max_tokens_has_two_names_in_chats() -> None:
    assert options(max_tokens=3).max_tokens == 3
    assert options(max_completion_tokens=4).max_tokens == 4
    assert options(max_tokens=4, max_completion_tokens=4).max_tokens == 4
    assert refused(max_tokens=3, max_completion_tokens=4).field == "max_completion_tokens"


def test_default_lengths() -> None:
    """A chat goes on until the context is full; a completion has OpenAI's 16 tokens."""
    assert options().max_tokens is None
    assert options(chat=False).max_tokens == 16


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    assert refused(min_tokens=5, max_tokens=4).field == "min_tokens"
    assert options(min_tokens=4, max_tokens=4).min_tokens == 4


def test_openai_defaults() -> None:
    sampling = options().sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.0, 0.0, 1.0)


def test_the_models_recommendations_apply_where_the_client_says_nothing() -> None:
    recommended = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.1)
    sampling = options(defaults=recommended, temperature=0).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 20, 0.95)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    off = options(defaults=recommended, top_k=0, top_p=1, min_p=0, repetition_penalty=1).sampling
    assert (off.top_k, off.top_p, off.min_p, off.repetition_penalty) == (0, 1.0, 0.0, 1.0)


def test_there_is_no_fixed_default_seed() -> None:
    assert len({options().sampling.seed for _ in range(8)}) == 8
    assert options(seed=-5).sampling.seed == -5


def test_stream_options() -> None:
    assert options(stream=True, stream_options={"include_usage": True}).include_usage
    assert options(stream=True, stream_options={"include_obfuscation": False}).include_usage is False
    assert refused(stream_options={"include_usage": True}).field == "stream_options"
    assert refused(stream=True, stream_options={"include_usage": 1}).field == "stream_options.include_usage"
    assert refused(stream=True, stream_options={"x": 1}).field == "stream_options.x"
    assert refused(stream=True, stream_options=[]).field == "stream_options"


def test_one_stop_string_or_several() -> None:
    assert options(stop="a").stops == ("a",)
    assert options(stop=["a", "b"]).stops == ("a", "b")


def test_a_message_never_repeats_a_long_value() -> None:
    assert len(str(refused(temperature="secret " * 100))) < 120


def test_prompts_of_every_kind() -> None:
    def prompts(value: object) -> object:
        return read_prompts(Fields({"prompt": value}), 100)

    assert prompts("a") == ("a",)
    assert prompts(["a", "b"]) == ("a", "b")
    assert prompts([1, 2]) == ((1, 2),)
    assert prompts([[1, 2], [3]]) == ((1, 2), (3,))


@pytest.mark.parametrize(
    "value",
    [None, [], 5, {}, ["a", 1], [1, "a"], [[1], 2], [100], [-1], [True], [[1], ["a"]], [1.0], "\udc00", ["\udc00"]],
)
def test_a_senseless_prompt_is_refused(value: object) -> None:
    with pytest.raises(RequestError) as caught:
        read_prompts(Fields({"prompt": value}), 100)
    assert caught.value.field == "prompt"


def messages(*items: object) -> object:
    return read_messages(Fields({"messages": list(items)}))


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages({"role": "user", "content": parts}) == ({"role": "user", "content": "a\nb"},)


def test_an_answer_of_the_official_client_may_be_sent_back() -> None:
    echoed = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "audio": None,
        "tool_calls": None,
        "annotations": [],
    }
    assert messages(echoed) == ({"role": "assistant", "content": "x"},)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (3, "messages[0]"), ({}, "messages[0].role"), ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"), ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}, "messages[0].content[0].y"),
        ({"role": "user", "content": "\ud800"}, "messages[0].content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": "x", "weight": 1}, "messages[0].weight"),
        ({"role": "user", "content": "x", "name": 5}, "messages[0].name"),
    ],
)  # fmt: skip
def test_a_wrong_message_is_refused_with_its_place(message: object, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        messages(message)
    assert caught.value.field == field


@pytest.mark.parametrize("value", [[], None, "hi", {}])
def test_messages_must_be_a_list_of_at_least_one(value: object) -> None:
    with pytest.raises(RequestError) as caught:
        read_messages(Fields({"messages": value}))
    assert caught.value.field == "messages"


@contextmanager
def understood_or_refused_by_name() -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        if error.field is None:
            raise AssertionError("no field is named") from error


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_NAMES = [
    "model", "temperature", "top_p", "top_k", "stop", "n", "seed", "stream", "stream_options", "max_tokens", "tools",
    "logit_bias", "user", "x",
]  # fmt: skip


@given(body=st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=4), chat=st.booleans())
def test_any_body_is_understood_or_refused(body: dict[str, object], chat: bool) -> None:
    with understood_or_refused_by_name():
        read_options(Fields(body), SamplingDefaults(), chat=chat)


@given(value=_JSON)
def test_any_messages_and_prompts_are_understood_or_refused(value: object) -> None:
    with understood_or_refused_by_name():
        read_messages(Fields({"messages": value}))
    with understood_or_refused_by_name():
        read_prompts(Fields({"prompt": value}), 10)


@pytest.mark.parametrize(
    ("body", "lane"),
    [
        ({}, "interactive"), ({"priority": "batch"}, "batch"), ({"priority": "interactive"}, "interactive"),
        ({"service_tier": "flex"}, "batch"), ({"service_tier": "batch"}, "batch"),
        ({"service_tier": "default"}, "interactive"), ({"service_tier": "priority"}, "interactive"),
        ({"service_tier": "auto", "priority": "batch"}, "batch"),
        ({"service_tier": "flex", "priority": "batch"}, "batch"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chat", [True, False])
def test_priority_and_service_tier_choose_the_lane(body: dict[str, object], lane: str, chat: bool) -> None:
    assert options(chat=chat, **body).lane == lane


@pytest.mark.parametrize(("priority", "tier"), [("batch", "default"), ("interactive", "flex")])
def test_a_priority_that_contradicts_the_service_tier_names_both(priority: str, tier: str) -> None:
    error = refused(priority=priority, service_tier=tier)
    assert error.field == "priority"
    assert "priority" in str(error) and "service_tier" in str(error)


def test_timeouts_are_in_seconds() -> None:
    wishes = {"timeout": 2.5, "queue_timeout": 1, "first_token_timeout": 2, "token_timeout": 0.5}
    assert options(**wishes).timeouts_s == {
        Limit.TOTAL: 2.5, Limit.QUEUE: 1, Limit.FIRST_TOKEN: 2, Limit.BETWEEN_TOKENS: 0.5
    }  # fmt: skip
    assert options().timeouts_s == {}
