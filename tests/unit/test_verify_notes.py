"""`potluck verify` says when its input is too short to leave a layer's window, whatever the family calls that."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cli.verify import _notes
from cluster.models.checkpoint import Checkpoint
from cluster.types import Backend, LayerRange
from node.hardware import Device
from node.verdict import Part
from node.verification import Subject
from tests.clusters import model

CONTEXT = 16_384


def notes(model_type: str, tokens: int, **config: object) -> tuple[str, ...]:
    checkpoint = Checkpoint(Path("model"), {"model_type": model_type, **config}, {})
    part = Part(0, LayerRange(0, 6), Device(Backend.TORCH, "cpu", "a processor"))
    return _notes(checkpoint, Subject(checkpoint.folder, model([50] * 6, context=CONTEXT), (part,)), tokens)


@pytest.mark.parametrize(
    ("model_type", "config", "window"),
    [
        ("gemma3_text", {"sliding_window": 1024}, 1024),
        ("mistral", {}, 4096),
        ("llama4_text", {}, 8192),
        ("llama4_text", {"attention_chunk_size": 64}, 64),
    ],
)
def test_tokens_that_never_leave_the_window_are_noted(model_type: str, config: dict[str, object], window: int) -> None:
    (note,) = notes(model_type, window, **config)
    assert note == f"{window} tokens lie within the window of {window}; --tokens {window * 3 // 2} passes it"
    assert not notes(model_type, window + 1, **config)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"sliding_window": 1024}),
        ("mistral", {"sliding_window": None}),
        ("gemma3_text", {"sliding_window": 1024, "layer_types": ["full_attention"] * 6}),
        ("mistral", {"sliding_window": CONTEXT}),
    ],
)
def test_a_window_that_no_input_leaves_is_not_noted(model_type: str, config: dict[str, object]) -> None:
    assert not notes(model_type, 48, **config)


def test_the_tokens_that_are_asked_for_fit_the_models_context() -> None:
    (note,) = notes("mistral", 48, sliding_window=CONTEXT - 1)
    assert note.endswith(f"--tokens {CONTEXT} passes it")
