"""Machines that vanish while they answer: the answer goes on in the same stream, or an error ends it within the grace.

What each stream carries is compared with what the same request drew before anything happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("torch", reason="the checkpoint is made with transformers: the extra [torch]")

from tests.integration.answers import Served
from tests.integration.fragile import Fragile
from tests.integration.live import Coordinator, eventually, processes_of

TOKENS, BEFORE = 400, 12
"""Of each answer, and of them before something happens."""

RESUMED_S = 3 * 6.0
"""Three times the slowest that is promised for so small a model."""

GRACE_S = 4.0
DRAWS: Mapping[str, Mapping[str, object]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "seed": 7, "top_p": 0.95},
}


@pytest.fixture(scope="module")
def spare(served: Served, mdns: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fragile]:
    """Two stages and a node more."""
    yield from _cluster(served, mdns, tmp_path_factory.mktemp("spare"), ("torch-1", "torch-2", "torch-3"), 60.0)


@pytest.fixture(scope="module")
def tight(served: Served, mdns: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fragile]:
    """Two stages, of both engines, and nobody else."""
    yield from _cluster(served, mdns, tmp_path_factory.mktemp("tight"), ("torch-1", "mlx-1"), GRACE_S)


def _cluster(served: Served, mdns: bool, folder: Path, names: tuple[str, ...], grace_s: float) -> Iterator[Fragile]:
    with contextlib.ExitStack() as stack:
        made = Fragile(folder, mdns, stack)
        made.serve(served.folder, "--min-nodes", "2", "--grace", str(grace_s))
        for name in names:
            made.start(name)
        yield made
    assert not processes_of(made.cluster)


class Stream:
    """A long answer, token by token."""

    def __init__(self, coordinator: Coordinator, prompt: tuple[int, ...], draw: Mapping[str, object]) -> None:
        body = {"prompt": list(prompt), "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}, **draw}
        self._opened = httpx.stream("POST", f"{coordinator.url}/v1/completions", json=body, timeout=120.0)
        self.ids: list[int] = []
        self.usage: Mapping[str, Any] = {}
        self.error = ""
        self.longest_gap_s = 0.0

    def __enter__(self) -> Stream:
        self._lines = self._opened.__enter__().iter_lines()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.__exit__(None, None, None)

    def read(self, tokens: int = 10 * TOKENS) -> list[int]:
        """So many tokens more, or what is left."""
        until, latest_s = len(self.ids) + tokens, time.monotonic()
        while len(self.ids) < until and (line := next(self._lines, None)) is not None:
            if not line.startswith("data: {"):
                continue
            self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - latest_s)
            latest_s = time.monotonic()
            event = json.loads(line.removeprefix("data: "))
            self.error = self.error or event.get("error", {}).get("message", "")
            self.usage = event.get("usage") or self.usage
            for choice in event.get("choices", ()):
                self.ids += choice.get("token_ids") or []
        return self.ids


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_an_answer_goes_on_without_the_machine_that_is_gone(
    how: signal.Signals, stage: int, draw: str, spare: Fragile, served: Served
) -> None:
    """No token is lost, repeated or another, and the client is told the same numbers as without a break."""
    coordinator, prompt = spare.whole(), served.asked.prompt
    with Stream(coordinator, prompt, DRAWS[draw]) as undisturbed:
        expected = undisturbed.read()
    node = spare.node_of(stage)
    try:
        with Stream(coordinator, prompt, DRAWS[draw]) as answer:
            answer.read(BEFORE)
            os.kill(node.pid, how)
            found = answer.read()
    finally:
        if how is signal.SIGSTOP:
            os.kill(node.pid, signal.SIGCONT)
    assert not answer.error
    assert len(expected) == TOKENS and found == expected
    assert answer.usage["completion_tokens"] == TOKENS
    assert answer.usage["prompt_tokens"] == len(prompt)
    assert answer.longest_gap_s < RESUMED_S
    eventually(coordinator.is_free, "nothing is left in the caches")


def test_an_answer_waits_for_a_machine_that_comes_back(tight: Fragile, served: Served) -> None:
    """Without it there is no plan. A request that comes meanwhile waits, too."""
    coordinator, prompt = tight.whole(), served.asked.prompt
    with Stream(coordinator, prompt, DRAWS["greedy"]) as undisturbed:
        expected = undisturbed.read()
    node = tight.node_of(1)
    with Stream(coordinator, prompt, DRAWS["greedy"]) as answer:
        answer.read(BEFORE)
        os.kill(node.pid, signal.SIGSTOP)
        time.sleep(GRACE_S / 2)
        os.kill(node.pid, signal.SIGCONT)
        assert answer.read() == expected and not answer.error


def test_when_nobody_comes_back_it_is_said_within_the_grace(tight: Fragile, served: Served) -> None:
    """To those who wait and to those who come; and when a machine is there again, it serves by itself."""
    coordinator, prompt = tight.whole(), served.asked.prompt
    node = tight.node_of(0)
    with Stream(coordinator, prompt, DRAWS["greedy"]) as answer:
        answer.read(BEFORE)
        os.kill(node.pid, signal.SIGKILL)
        began_s = time.monotonic()
        answer.read()
        took_s = time.monotonic() - began_s
    assert "no machine came back within 4 s" in answer.error and "one more node" in answer.error
    assert GRACE_S - 0.5 < took_s < GRACE_S + 3 * 2.0
    refused = coordinator.post("/v1/completions", {"prompt": [9, 9], "max_tokens": 1})
    assert refused.status_code == 503 and "one more node" in refused.text
    assert tight.whole().is_unharmed(served.asked.prompt, served.asked.ids)
