"""The built-in model answers what it claims to, the same in both libraries, and fits the package.

Owns the accuracy test. The questions and their only right answers come from the text generator beside the
training script; the same script and seed must pass the same test.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from coordinator.builtin import demo_model_path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRIPTS = Path(__file__).parents[2] / "deploy" / "demo_model"
PACKAGE_BYTES_MAX = 8_000_000
HELD_OUT_RIGHT_MIN = 0.90
# A bf16 logit of about 16 is rounded by up to 0.06; twenty times that leaves any engine the same choice.
FIRST_QUESTIONS_GAP_MIN = 1.5
TYPICAL_GAP_MIN = 2.5

sys.path.append(str(SCRIPTS))  # The scripts are run by path and import each other as neighbours.
import check  # noqa: E402
import corpus  # noqa: E402
import phrasings  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return check.load(demo_model_path())


@pytest.fixture(scope="module")
def first_outcomes(loaded: tuple[Any, Any]) -> list[check.Outcome]:
    return check.answer_all(*loaded, check.first_questions())


@pytest.fixture(scope="module")
def held_out_outcomes(loaded: tuple[Any, Any]) -> list[check.Outcome]:
    return check.answer_all(*loaded, check.held_out_questions())


def test_the_first_questions_are_all_answered_right(first_outcomes: list[check.Outcome]) -> None:
    wrong = [(outcome.history, outcome.answered) for outcome in first_outcomes if not outcome.right]
    assert not wrong


def test_nine_of_ten_held_out_questions_are_answered_right(held_out_outcomes: list[check.Outcome]) -> None:
    right = sum(outcome.right for outcome in held_out_outcomes)
    print(f"held-out questions: {right}/{len(held_out_outcomes)} right")  # noqa: T201 - the score, with -s
    assert len(held_out_outcomes) >= 200
    assert right >= HELD_OUT_RIGHT_MIN * len(held_out_outcomes)


def test_every_choice_of_a_first_answer_is_decisive(first_outcomes: list[check.Outcome]) -> None:
    assert min(outcome.smallest_gap for outcome in first_outcomes) >= FIRST_QUESTIONS_GAP_MIN


def test_most_held_out_answers_are_decisive_throughout(held_out_outcomes: list[check.Outcome]) -> None:
    """Nine of ten right answers never choose between two tokens by less than the typical gap."""
    gaps = sorted(outcome.smallest_gap for outcome in held_out_outcomes if outcome.right)
    assert gaps[len(gaps) // 10] >= TYPICAL_GAP_MIN


def test_training_never_sees_a_held_out_phrasing() -> None:
    """No sampled training question is, in any case and with any marks, a held-out question without slots."""
    held_out = {
        phrasings.words(phrasing.template)
        for known in phrasings.phrasings().values()
        for phrasing in known
        if phrasing.held_out and "{" not in phrasing.template
    }
    talks = itertools.islice(corpus.training_conversations(seed=0), 5000)
    trained = {phrasings.words(turn.question) for talk in talks for turn in talk.exchanges}
    assert len(held_out) >= 200
    assert not held_out & trained


def test_the_same_seed_generates_the_same_text() -> None:
    first, second = (list(itertools.islice(corpus.training_conversations(seed=0), 50)) for _ in range(2))
    assert first == second


def test_a_plain_fact_is_completed_without_a_chat(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=8)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True) == " Paris."


def test_any_text_survives_the_tokenizer(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    text = "Ünïcödé 漢字 👩‍🔬\n\ttabs  and   spaces\r\n\x00\U0010ffff 12345"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_template_takes_a_system_message_and_content_in_parts(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_model_fits_the_package() -> None:
    assert sum(file.stat().st_size for file in demo_model_path().iterdir()) <= PACKAGE_BYTES_MAX


def test_the_checkpoint_is_what_transformers_writes(loaded: tuple[Any, Any]) -> None:
    """bf16 tensors under transformers' names, the tied head once, at least eight layers."""
    model, _ = loaded
    with safe_open(demo_model_path() / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict()) - {"lm_head.weight"}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert model.config.num_hidden_layers >= 8


def test_both_forms_of_the_rope_base_agree() -> None:
    """Older readers know only the top-level field; a wrong base is silent."""
    config = json.loads((demo_model_path() / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_mlx_gives_the_same_answers(loaded: tuple[Any, Any], first_outcomes: list[check.Outcome]) -> None:
    pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    model, tokenizer = mlx_lm.load(str(demo_model_path()))
    for outcome in first_outcomes:
        prompt = tokenizer.apply_chat_template(list(outcome.history), add_generation_prompt=True)
        assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=check.NEW_TOKENS) == outcome.answered
