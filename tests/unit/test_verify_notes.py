"""`potluck verify` says when its input is too short to leave a layer's window, whatever the family calls that, and when
its reference is known to compute something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli.verify_notes import notes_on_input, notes_on_reference
from cluster.models.checkpoint import Checkpoint
from cluster.types import Backend, LayerRange
from node.hardware import Device
from node.verdict import Part
from node.verification import Subject
from tests.clusters import model

CONTEXT = 16_384


CPU = Device(Backend.TORCH, "cpu", "a processor")
MLX = Device(Backend.MLX, "cpu", "a processor")


def case(model_type: str, config: dict[str, object]) -> tuple[Checkpoint, Subject]:
    checkpoint = Checkpoint(Path("model"), {"model_type": model_type, **config}, {})
    facts = replace(model([50] * 6, context=CONTEXT), model_type=model_type)
    return checkpoint, Subject(checkpoint.folder, facts, (Part(0, LayerRange(0, 6), CPU),))


def notes(model_type: str, tokens: int, **config: object) -> tuple[str, ...]:
    return notes_on_input(*case(model_type, config), tokens)


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


def test_a_reference_that_computes_otherwise_than_the_publisher_is_noted() -> None:
    yarn = {"rope_type": "yarn", "factor": 32.0, "rope_theta": 150_000.0}
    for name in ("rope_scaling", "rope_parameters"):
        untruncated = case("gpt_oss", {name: yarn | {"truncate": False}})
        (note,) = notes_on_reference(*untruncated, MLX, 48)
        assert note.startswith("mlx-lm rounds where yarn's stretching begins")
        assert notes_on_reference(*untruncated, CPU, 48) == ()
        assert notes_on_reference(*case("gpt_oss", {name: yarn}), MLX, 48) == ()
    windowed = case("gemma2", {"sliding_window": 64})
    (note,) = notes_on_reference(*windowed, MLX, 65)
    assert "no windows in Gemma 2" in note
    assert notes_on_reference(*windowed, MLX, 64) == ()
    assert notes_on_reference(*case("mistral", {"sliding_window": 64}), MLX, 65) == ()
