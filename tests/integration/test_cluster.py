"""Clusters of one, two and three nodes answer over HTTP what a single process answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the checkpoints are made with transformers: the extra [torch]")

from tests.checkpoints import FAMILIES
from tests.integration.answers import Question, questions
from tests.integration.live import Coordinator, Pool, has_backend
from tests.oracle.reference import WholeModel

LAYOUTS = {
    "torch": ("torch-a",),
    "torch-torch": ("torch-a", "torch-b"),
    "torch-torch-torch": ("torch-a", "torch-b", "torch-c"),
    "mlx": ("mlx-a",),
    "mlx-mlx": ("mlx-a", "mlx-b"),
    "mlx-mlx-mlx": ("mlx-a", "mlx-b", "mlx-c"),
    "torch-mlx": ("torch-a", "mlx-a"),
    "torch-mlx-torch": ("torch-a", "mlx-a", "torch-b"),
}
"""The order of stages is placement's; the names say which engines take part."""

OTHERS = [("torch-mlx-torch", family) for family in (*FAMILIES, "gemma4_small") if family != "qwen3"]


def _needs(layout: str) -> tuple[str, ...]:
    """The layout's nodes; skips where an engine is not installed."""
    for backend in set(layout.split("-")):
        if not has_backend(backend):
            pytest.skip(f"the engine is not installed: the extra [{backend}]")
    return LAYOUTS[layout]


@pytest.fixture(scope="module", params=[*((layout, "qwen3") for layout in LAYOUTS), *OTHERS], ids="/".join)
def served(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A layout and a family."""
    return request.param


@pytest.fixture(scope="module")
def coordinator(served: tuple[str, str], pool: Pool, checkpoint: Callable[[str], Path]) -> Iterator[Coordinator]:
    layout, family = served
    names = _needs(layout)
    with pool.serving(checkpoint(family), names) as made:
        stages = made.status()["plan"]["stages"]
        assert sorted(stage["node"] for stage in stages) == sorted(names)
        yield made


@pytest.fixture(scope="module")
def references(checkpoint: Callable[[str], Path]) -> Callable[[str], list[Question]]:
    @cache
    def make(family: str) -> list[Question]:
        return questions(WholeModel(checkpoint(family)))

    return make


@pytest.fixture
def asked(served: tuple[str, str], references: Callable[[str], list[Question]]) -> list[Question]:
    return references(served[1])


def test_each_answer_is_the_single_process_one(coordinator: Coordinator, asked: list[Question]) -> None:
    """Greedy and with seeds, under every kind of filter and penalty, one after the other."""
    for item in asked:
        found = coordinator.complete(item.prompt, **item.fields())
        assert tuple(found["token_ids"]) == item.ids, item.sampling
        assert found["finish_reason"] == "length"


def test_answers_are_the_same_among_others(coordinator: Coordinator, asked: list[Question]) -> None:
    """Sixteen at once, each question twice: ragged batches, prefills among decodes."""
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda item: coordinator.complete(item.prompt, **item.fields()), asked * 2))
    assert [tuple(choice["token_ids"]) for choice in found] == [item.ids for item in asked * 2]
