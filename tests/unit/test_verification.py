"""What `potluck verify` calls an error, and whom it blames, with stages of plain numpy arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cluster.cli.verify_report import Report, document, verdict_line
from cluster.errors import BadLogits
from cluster.steps import Boundary, Row
from cluster.types import Backend, DType, LayerRange, TensorSpec
from node.comparison import (
    TOLERANCES,
    Floats,
    Trace,
    drawn_tokens,
    from_host,
    to_host,
    tolerance,
)
from node.engine import Engine, Logits, Progress, StageSpec
from node.hardware import Device
from node.verdict import Part, Verdict
from node.verification import Subject, verify
from tests import clusters

HIDDEN, VOCABULARY, LAYERS = 16, 32, 6
CPU = Device(Backend.TORCH, "cpu", "a processor")
METAL = Device(Backend.MLX, "metal", "another one")

RANDOM = np.random.default_rng(7)
EMBEDDING = RANDOM.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
MATRICES = RANDOM.normal(size=(LAYERS, HIDDEN, HIDDEN)).astype(np.float32) / HIDDEN
HEAD = RANDOM.normal(size=(HIDDEN, VOCABULARY)).astype(np.float32)
TOKENS = tuple(int(token) for token in RANDOM.integers(0, VOCABULARY, size=20))

FACTS = replace(
    clusters.model([1] * LAYERS),
    dtype=DType.F32,
    hidden_size=HIDDEN,
    vocab_size=VOCABULARY,
    boundary=(TensorSpec("hidden", (HIDDEN,), DType.F32),),
)

Layer = Callable[[int, Floats, int], Floats]
"""What layer `index` makes of hidden states whose first token is at a position."""


def right(index: int, hidden: Floats, start: int) -> Floats:
    return np.asarray(hidden + np.tanh(hidden @ MATRICES[index]), dtype=np.float32)


def trace(tokens: tuple[int, ...] = TOKENS, layer: Layer = right) -> Trace:
    hidden = [EMBEDDING[list(tokens)]]
    for index in range(LAYERS):
        hidden.append(layer(index, hidden[-1], 0))
    return Trace(CPU, tokens, tuple(hidden), (hidden[-1] @ HEAD)[-drawn_tokens(len(tokens)) :])


@dataclass
class PlainEngine:
    """The stages of that model. `seen` collects what happens, over all engines of a test."""

    layer: Layer
    seen: list[str]
    rows: list[Row] = field(default_factory=list)

    @property
    def backend(self) -> Backend:
        return Backend.TORCH

    def load(self, spec: StageSpec, progress: Progress) -> None:
        self.spec = spec
        self.seen.append(f"load {spec.layers}")

    def step(self, rows: Sequence[Row], inputs: Boundary | None) -> Boundary | Logits:
        (row,) = rows
        self.rows.append(row)
        hidden = EMBEDDING[list(row.tokens)] if inputs is None else from_host(inputs[0])
        for index in self.spec.layers:
            hidden = self.layer(index, hidden, row.start)
        if self.spec.is_last:
            return hidden[-1:] @ HEAD if row.draw else np.empty((0, VOCABULARY), np.float32)
        return (to_host(hidden, DType.F32),)

    def close(self) -> None:
        self.seen.append(f"close {self.spec.layers}")


def stages(*cuts: int, devices: Sequence[Device] = (CPU, CPU, CPU)) -> tuple[Part, ...]:
    bounds = (0, *cuts, LAYERS)
    return tuple(
        Part(stage, LayerRange(first, last), devices[stage]) for stage, (first, last) in enumerate(pairwise(bounds))
    )


def verdict_of(
    layer: Layer = right,
    parts: tuple[Part, ...] | None = None,
    seen: list[str] | None = None,
    reference: Layer = right,
) -> Verdict:
    happened = [] if seen is None else seen

    def create(backend: Backend) -> Engine:
        engine: object = PlainEngine(layer, happened)
        return engine  # type: ignore[return-value]

    subject = Subject(Path("nowhere"), FACTS, parts or stages(3))
    return verify(subject, trace(layer=reference), create, lambda what, done, total: None)


def report_of(verdict: Verdict) -> Report:
    return Report("paper", "local", FACTS, len(TOKENS), CPU, verdict, (), True, ())


def off_in_layer(wrong: int, by: float = 0.01) -> Layer:
    def layer(index: int, hidden: Floats, start: int) -> Floats:
        return right(index, hidden, start) + np.float32(by if index == wrong else 0)

    return layer


def test_stages_that_compute_the_same_are_within_tolerance() -> None:
    verdict = verdict_of()
    assert verdict.within
    assert [str(stage.part.layers) for stage in verdict.stages] == ["0-2", "3-5"]
    assert [layer.part.layers.first for layer in verdict.layers] == list(range(LAYERS))
    assert verdict.chain.expected_tokens == verdict.chain.found_tokens
    assert len(verdict.chain.found_tokens) == 8


@pytest.mark.parametrize("wrong", range(LAYERS))
def test_a_layer_that_is_off_is_named_and_no_other(wrong: int) -> None:
    verdict = verdict_of(off_in_layer(wrong))
    assert [layer.part.layers.first for layer in verdict.layers if not layer.within] == [wrong]
    assert [stage.part.stage for stage in verdict.stages if not stage.within] == [wrong // 3]
    assert not verdict.chain.within
    assert not verdict.within
    assert verdict.worst_layer.part.layers.first == wrong
    line = verdict_line(report_of(verdict))
    assert line.startswith(f"NOT within tolerance: stage {wrong // 3}; the chain; layer {wrong}.")
    assert f"The worst layer is layer {wrong}" in line


def test_a_layer_may_be_wrong_where_its_stage_is_not() -> None:
    """Several layers may be off by more than one, and each is still held to its own tolerance."""

    def off(index: int, hidden: Floats, start: int) -> Floats:
        return right(index, hidden, start) * np.float32(1 + (2.6e-5 if index == 4 else 0))

    verdict = verdict_of(off)
    assert verdict.chain.within
    assert all(stage.within for stage in verdict.stages)
    assert [layer.part.layers.first for layer in verdict.layers if not layer.within] == [4]
    assert not verdict.within


def test_a_layer_that_takes_an_outsized_element_away_may_leave_its_rounding() -> None:
    def reference(index: int, hidden: Floats, start: int) -> Floats:
        spike = np.zeros(HIDDEN, np.float32)
        spike[3] = {1: 1000, 2: -1000}.get(index, 0)
        return right(index, hidden, start) + spike

    def rounded(index: int, hidden: Floats, start: int) -> Floats:
        return reference(index, hidden, start) + np.float32(0.002 if index == 2 else 0) * (np.arange(HIDDEN) == 3)

    assert verdict_of(rounded, stages(1), reference=reference).layers[2].within


def test_a_later_stage_is_not_blamed_for_what_it_was_sent() -> None:
    verdict = verdict_of(off_in_layer(0), stages(2, 4))
    assert [stage.within for stage in verdict.stages] == [False, True, True]


def test_tokens_that_are_wrong_only_when_decoded_are_seen() -> None:
    """A cache that loses the prompt, say: the prefill itself is right."""

    def forgetful(index: int, hidden: Floats, start: int) -> Floats:
        return right(index, hidden, start) + np.float32(0.01 if index == 1 and start == len(TOKENS) - 1 else 0)

    assert [layer.part.layers.first for layer in verdict_of(forgetful).layers if not layer.within] == [1]


def test_stages_that_are_right_alone_and_wrong_together_fail_the_chain() -> None:
    """The second sequence on an engine is the chained one: here it is disturbed."""
    calls: dict[int, int] = {}

    def leaky(index: int, hidden: Floats, start: int) -> Floats:
        calls[index] = calls.get(index, 0) + 1
        return right(index, hidden, start) + np.float32(0.01 if 10 < calls[index] <= 20 else 0)

    verdict = verdict_of(leaky)
    assert all(part.within for part in (*verdict.stages, *verdict.layers))
    assert not verdict.chain.within
    assert "NOT within tolerance: the chain." in verdict_line(report_of(verdict))


def test_an_answer_of_nan_is_never_within_tolerance_and_is_the_worst() -> None:
    verdict = verdict_of(off_in_layer(2, by=float("nan")))
    assert not verdict.within
    assert verdict.worst_layer.part.layers.first == 2


def test_one_engine_is_in_memory_at_a_time() -> None:
    seen: list[str] = []
    verdict_of(seen=seen)
    assert len(seen) == 2 * (2 + LAYERS)
    for loaded, closed in zip(seen[::2], seen[1::2], strict=True):
        assert loaded.replace("load", "close") == closed


def test_an_engine_that_fails_is_closed() -> None:
    seen: list[str] = []

    def broken(index: int, hidden: Floats, start: int) -> Floats:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        verdict_of(broken, seen=seen)
    assert seen == ["load 0-2", "close 0-2"]


@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 17, 48])
def test_the_input_arrives_as_a_prompt_in_two_chunks_and_then_token_by_token(count: int) -> None:
    engines: list[PlainEngine] = []

    def create(backend: Backend) -> Engine:
        engines.append(PlainEngine(right, []))
        engine: object = engines[-1]
        return engine  # type: ignore[return-value]

    tokens = tuple(token % VOCABULARY for token in range(count))
    subject = Subject(Path("nowhere"), FACTS, stages(3))
    assert verify(subject, trace(tokens), create, lambda what, done, total: None).within
    for engine in engines:
        for seq in {row.seq for row in engine.rows}:
            rows = [row for row in engine.rows if row.seq == seq]
            assert sum((row.tokens for row in rows), ()) == tokens
            drawing = [row for row in rows if row.draw]
            assert [len(row.tokens) for row in drawing] == [1] * min(8, count - 1)
            assert len(rows) - len(drawing) == (2 if count - len(drawing) > 1 else 1)


def test_layers_that_cannot_be_cut_apart_are_compared_together() -> None:
    facts = replace(FACTS, legal_cuts=frozenset({0, 2, 3}))
    subject = Subject(Path("nowhere"), facts, stages(3))
    assert [str(part.layers) for part in subject.layers] == ["0-1", "2-2", "3-5"]


def test_a_model_is_routed_when_a_token_does_not_use_all_weights_of_a_layer() -> None:
    def routed(streamed: list[int]) -> bool:
        return Subject(Path("nowhere"), clusters.model([8, 8], streamed=streamed), ()).routed

    assert [routed([8, 8]), routed([8, 2])] == [False, True]


def test_another_library_or_device_gets_the_wider_tolerance_and_its_layers_alone_do() -> None:
    verdict = verdict_of(parts=stages(3, devices=(CPU, METAL)))
    known = TOLERANCES[DType.F32]
    assert [layer.tolerance for layer in verdict.layers] == [known.same] * 3 + [known.other] * 3
    assert verdict.chain.tolerance == tolerance(DType.F32, LAYERS, same=False, routed=False)


def test_a_reference_that_overflows_is_refused_and_says_where() -> None:
    whole = trace()
    hidden = list(whole.hidden)
    hidden[2] = np.full_like(hidden[2], np.inf)
    with pytest.raises(BadLogits, match="what enters layer 2"):
        replace(whole, hidden=tuple(hidden))
    with pytest.raises(BadLogits, match="in the logits"):
        replace(whole, logits=np.full_like(whole.logits, np.nan))


def test_the_document_is_json_even_where_an_error_is_not_a_number() -> None:
    found = json.loads(json.dumps(document(report_of(verdict_of(off_in_layer(2, by=float("nan"))))), allow_nan=False))
    assert not found["ok"]
    assert found["worst_layer"] == 2
    assert found["layers"][2]["error"] is None
    assert [layer["ok"] for layer in found["layers"]] == [True, True, False, True, True, True]
    assert [(stage["first_layer"], stage["last_layer"]) for stage in found["stages"]] == [(0, 3), (3, 6)]
