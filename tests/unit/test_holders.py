"""Who sends how much, from answers that come now and then."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.errors import NodeRefused
from cluster.types import NodeId
from cluster.weight_service import pack_bits
from coordinator.holders import Held, Holders
from tests.stored_weights import SourceModel


def test_what_was_sent_between_two_answers_is_the_rate() -> None:
    assert Held(10, 1000, 0.0, 5.0).then(b"x", 20, 1600, 7.0) == Held(20, 1600, 300.0, 7.0, b"x")


def test_a_node_that_started_anew_sends_nothing_backwards() -> None:
    assert Held(10, 1000, 300.0, 5.0).then(b"x", 10, 40, 7.0) == Held(10, 40, 0.0, 7.0, b"x")


class _Node:
    """Answers with what the test sets, as a NodeClient does."""

    def __init__(self) -> None:
        self.answer: tuple[bytes, int] | None = None

    async def holdings(self, _model: str) -> tuple[bytes, int]:
        if self.answer is None:
            raise NodeRefused("nothing of this model is here")
        return self.answer


def test_the_bytes_of_the_tensors_that_a_node_holds_are_added_up(tmp_path: Path) -> None:
    manifest = SourceModel(tmp_path / "model", 0, 64).manifest
    node: Any = _Node()
    roster: Any = SimpleNamespace(members={NodeId("n"): SimpleNamespace(client=node)})
    holders = Holders(manifest, roster, now=lambda: 0.0)
    held = []
    for here in (None, [1, 2], [1, 2, 3], []):
        flags = [index in (here or ()) for index in range(len(manifest.tensors))]
        node.answer = None if here is None else (pack_bits(flags), 0)
        asyncio.run(holders._ask(NodeId("n"), node))
        held.append(holders.held[NodeId("n")].held_bytes)
    assert held == [0, 128, 192, 0]
