"""A chat goes on where its last turn ended, on a cluster of both engines; and every turn from nothing when asked to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the checkpoint is made with transformers: the extra [torch]")

from cluster.cli.status import status_lines
from tests.integration.answers import Served
from tests.integration.live import Coordinator, Pool, eventually
from tests.oracle.conftest import TOLERANCE

SAID = "Tell me at length what every machine of this cluster brings to the table, and who brought it."
"""Long enough that a second turn is worth a fork."""


def _two_turns(coordinator: Coordinator, served: Served) -> list[int]:
    """A chat whose answers are the whole model's; returns how much of each turn's prompt was not computed again."""
    messages = [{"role": "user", "content": SAID}]
    cached = []
    for _ in range(2):
        body = {"messages": messages, "temperature": 0, "max_tokens": 24, "return_token_ids": True, "ignore_eos": True}
        response = coordinator.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        answer = response.json()
        prompt = list(served.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        ids = answer["choices"][0]["token_ids"]
        logits = served.whole.logits([*prompt, *ids])[len(prompt) - 1 : -1]
        assert (logits.max(axis=1) - logits[np.arange(len(ids)), ids]).max() <= 2 * TOLERANCE
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        said = answer["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    return cached


def _held(status: Any) -> set[int]:
    return {node["kv_tokens_used"] for node in status["nodes"] if node["stage"] is not None}


def test_switched_off_every_prompt_is_computed_and_nothing_is_kept(pool: Pool, served: Served) -> None:
    with pool.serving(served.folder, ("torch-a",), "--no-prefix-cache") as forgetful:
        assert _two_turns(forgetful, served) == [0, 0]
        assert "prefix cache: off" in status_lines(forgetful.status())
        eventually(lambda: _held(forgetful.status()) == {0}, "the stage holds nothing")


def test_a_second_turn_computes_only_what_is_new(mixed: Coordinator, served: Served) -> None:
    """At least the first turn's prompt is there; the answer's text may come back as other tokens than were drawn."""
    first, second = _two_turns(mixed, served)
    assert first == 0
    assert second >= len(served.chat_ids(SAID))


def test_the_status_says_what_is_kept_and_what_that_saved(mixed: Coordinator, served: Served) -> None:
    _two_turns(mixed, served)

    def accounted_for() -> bool:
        status = mixed.status()
        kept = status["load"]["prefix_cache"]["retained_tokens"]
        return kept > 0 and _held(status) == {kept}

    eventually(accounted_for, "each stage holds what is kept and nothing else")
    assert any(
        line.startswith("prefix cache: ") and "not computed again" in line for line in status_lines(mixed.status())
    )
