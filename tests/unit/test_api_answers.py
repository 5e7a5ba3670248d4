"""Chats and completions that are not streamed, over a generator without a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.generation import Choice
from coordinator.text.tokenizer import Tokenizer
from tests.asking import HI, chat, complete
from tests.fake_generator import FakeGenerator, text_model
from tests.tiny_tokenizers import END, THINK, byte_fallback

# -- Chats ---------------------------------------------------------------------------------------------------


def test_a_chat_answer_has_openais_shape() -> None:
    generator = FakeGenerator()
    answer = chat(generator)
    tokens = len(generator.encode("hello world")) + 1
    prompt = len(generator.encode("[user]hi\n[assistant]"))
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "demo")
    message = {"role": "assistant", "content": "hello world", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_what_was_not_computed_again_is_counted() -> None:
    generator = FakeGenerator()
    generator.cached = {0: 3}
    assert chat(generator)["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_of_several_choices_prompts_only_what_none_had_to_compute_counts_as_cached() -> None:
    """The second choice has what the first one computed. With two prompts of two choices, each prompt counts once."""
    generator = FakeGenerator()
    generator.cached = {0: 2, 1: 9, 3: 9}
    assert complete(generator, n=2)["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    generator.cached = {0: 2, 1: 9, 2: 5, 3: 4}
    answer = complete(generator, prompt=["hello world", "hello there"], n=2)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2 + 4}


def test_the_chat_template_makes_the_prompt() -> None:
    generator = FakeGenerator()
    chat(generator, messages=[{"role": "developer", "content": "be brief"}, *HI])
    assert generator.requests[0].prompts == (generator.encode("[system]be brief\n[user]hi\n[assistant]"),)


def test_a_long_chat_is_understood_in_a_thread_with_the_same_result() -> None:
    generator = FakeGenerator(context_tokens=100_000)
    chat(generator, messages=[{"role": "user", "content": "hello " * 3000}], max_tokens=1)
    assert generator.requests[0].prompts == (generator.encode("[user]" + "hello " * 3000 + "\n[assistant]"),)


def test_special_tokens_surround_a_plain_prompt_and_not_a_chat() -> None:
    """A chat template has written them already."""
    generator = FakeGenerator("a", text=replace(text_model(), tokenizer=Tokenizer(byte_fallback())))
    chat(generator)
    complete(generator)
    assert [request.prompts[0][0] == 1 for request in generator.requests] == [False, True]


def test_every_sampling_field_reaches_the_scheduler() -> None:
    generator = FakeGenerator()
    chat(
        generator, temperature=0.5, top_k=3, top_p=0.8, min_p=0.1, presence_penalty=0.2, frequency_penalty=0.3,
        repetition_penalty=1.2, seed=9, n=2, max_tokens=6, min_tokens=2, ignore_eos=True,
    )  # fmt: skip
    request = generator.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 3, 0.8, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.2, 0.3, 1.2)
    assert (sampling.seed, request.n, request.max_tokens, request.min_tokens) == (9, 2, 6, 2)
    assert request.ignore_eos
    assert request.eos_ids == generator.text.eos_ids


def test_choices_of_a_prompt_have_their_own_noise_and_prompts_share_it() -> None:
    """A prompt in a list draws what it would draw alone."""
    generator = FakeGenerator()
    complete(generator, prompt=["a", "b"], n=2, seed=1, max_tokens=2)
    choices = list(generator.requests[0].choices(200))
    assert [(choice.index, choice.sampling.choice) for choice in choices] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert [choice.prompt for choice in choices] == [generator.encode(text) for text in "aabb"]


def test_max_tokens_ends_with_length() -> None:
    answer = chat(FakeGenerator(), max_completion_tokens=2)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2


def test_without_max_tokens_a_chat_may_fill_the_context() -> None:
    answer = chat(FakeGenerator(context_tokens=60), ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 60


def test_the_recommended_sampling_of_the_model_applies() -> None:
    generator = FakeGenerator(text=text_model(temperature=0.6, top_k=20))
    chat(generator)
    chat(generator, temperature=1, top_k=0)
    assert [(r.sampling.temperature, r.sampling.top_k) for r in generator.requests] == [(0.6, 20), (1.0, 0)]


def test_n_answers_are_told_apart() -> None:
    def answer(choice: Choice) -> tuple[int, ...]:
        return generator.encode(f"answer {choice.index}")

    generator = FakeGenerator(answer)
    found = chat(generator, n=3)["choices"]
    assert [(c["index"], c["message"]["content"]) for c in found] == [(i, f"answer {i}") for i in range(3)]


def test_an_alias_names_the_model_and_the_answer_says_its_own_name() -> None:
    assert chat(FakeGenerator(), model="org/demo")["model"] == "demo"


def test_token_ids_come_back_on_request() -> None:
    generator = FakeGenerator()
    answer = chat(generator, return_token_ids=True)
    (end,) = generator.text.eos_ids
    assert answer["prompt_token_ids"] == list(generator.encode("[user]hi\n[assistant]"))
    assert answer["choices"][0]["token_ids"] == [*generator.encode("hello world"), end]


def test_special_tokens_are_not_shown_and_other_added_tokens_are() -> None:
    assert chat(FakeGenerator(f"{THINK}a"))["choices"][0]["message"]["content"] == f"{THINK}a"
    looping = chat(FakeGenerator("a"), ignore_eos=True, max_tokens=4)
    assert looping["choices"][0]["message"]["content"] == "aa"


def test_an_end_of_sequence_that_is_plain_text_is_not_shown_either() -> None:
    generator = FakeGenerator("hello")
    visible = generator.encode(" world")[0]
    generator = FakeGenerator("hello", text=replace(generator.text, eos_ids=frozenset({visible})))
    assert chat(generator)["choices"][0]["message"]["content"] == "hello"


# -- Completions ---------------------------------------------------------------------------------------------


def test_a_completion_has_openais_shape() -> None:
    answer = complete(FakeGenerator())
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "stop"}]


@pytest.mark.parametrize("as_ids", [False, True])
def test_one_prompt_or_several_as_text_or_token_ids(as_ids: bool) -> None:
    generator = FakeGenerator()
    expected = [generator.encode("hello"), generator.encode("hi there")]
    complete(generator, prompt=expected[0] if as_ids else "hello")
    complete(generator, prompt=expected if as_ids else ["hello", "hi there"])
    assert generator.requests[0].prompts == (expected[0],)
    assert generator.requests[1].prompts == tuple(expected)


def test_answers_to_several_prompts_are_numbered_through() -> None:
    answer = complete(FakeGenerator(), prompt=["a", "b"], n=2, return_token_ids=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    prompts = [choice["prompt_token_ids"] for choice in answer["choices"]]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert answer["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[2])


def test_a_completion_without_max_tokens_has_sixteen() -> None:
    assert complete(FakeGenerator(), ignore_eos=True)["usage"]["completion_tokens"] == 16


# -- Stop strings --------------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_choice_before_it_and_cancels_the_rest() -> None:
    generator = FakeGenerator()
    answer = chat(generator, stop=["o w", "zzz"], n=2)
    assert [c["message"]["content"] for c in answer["choices"]] == ["hell", "hell"]
    assert {c["finish_reason"] for c in answer["choices"]} == {"stop"}
    assert generator.ended == [(generator.requests[0].id, 0), (generator.requests[0].id, 1)]
    assert generator.finished == [generator.requests[0].id]


def test_tokens_after_a_stop_string_are_not_counted() -> None:
    generator = FakeGenerator("hello world hello world hello world")
    answer = chat(generator, stop="hello", return_token_ids=True)
    tokens = answer["choices"][0]["token_ids"]
    assert generator.text.tokenizer.decode(tokens) == "hello"
    assert answer["usage"]["completion_tokens"] == len(tokens)


def test_text_that_only_began_like_a_stop_string_is_shown_in_the_end() -> None:
    assert chat(FakeGenerator(), stop="world!")["choices"][0]["message"]["content"] == "hello world"


def test_a_stop_string_counts_only_from_min_tokens_on() -> None:
    answer = chat(FakeGenerator("a" * 10), stop="a", min_tokens=4, max_tokens=9)
    assert answer["choices"][0]["message"]["content"] == "aaaa"


def test_a_special_token_written_by_the_client_is_recognised_in_a_completion() -> None:
    generator = FakeGenerator()
    complete(generator, prompt=f"a{END}")
    assert generator.requests[0].prompts[0][-1] in generator.text.eos_ids
