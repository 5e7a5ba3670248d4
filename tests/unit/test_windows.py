"""How far back layers look, as transformers reads a configuration; its own reading is compared at every load."""

from __future__ import annotations

import pytest

from cluster.errors import ModelError
from cluster.models.families import family_of
from cluster.models.windows import read_windows


def windows(model_type: str, **config: object) -> tuple[int | None, ...]:
    family, text = family_of({"model_type": model_type, **config}, "model")
    return read_windows(family, text, 6, "model")


@pytest.mark.parametrize(
    ("model_type", "config", "expected"),
    [
        ("llama", {"sliding_window": 8}, (None,) * 6),
        ("mistral", {}, (4096,) * 6),
        ("mistral", {"sliding_window": None}, (None,) * 6),
        ("phi3", {}, (None,) * 6),
        ("phi3", {"sliding_window": 8}, (8,) * 6),
        ("gemma2", {"sliding_window": 8}, (8, None) * 3),
        ("olmo3", {"sliding_window": 8}, (8, 8, 8, None, 8, 8)),
        ("gpt_oss", {}, (128, None) * 3),
        ("gemma3_text", {"sliding_window_pattern": 2, "sliding_window": 8}, (8, None) * 3),
        ("gemma3_text", {}, (*(4096,) * 5, None)),
        ("llama4_text", {}, (8192, 8192, 8192, None, 8192, 8192)),
        ("llama4_text", {"attention_chunk_size": 8, "no_rope_layer_interval": 2, "no_rope_layers": []}, (8, None) * 3),
        ("llama4_text", {"attention_chunk_size": 8, "no_rope_layers": [0, 1, 1, 1, 1, 0]}, (None, *(8,) * 4, None)),
        ("llama4_text", {"layer_types": ["full_attention"] * 6}, (None,) * 6),
        ("gemma4_text", {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}, (*(512,) * 5, None)),
    ],
)
def test_silence_means_what_transformers_takes_it_for(
    model_type: str, config: dict[str, object], expected: tuple[int | None, ...]
) -> None:
    assert windows(model_type, **config) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sliding_window": 0}, "expected sliding_window from 1"),
        ({"sliding_window": True}, "expected sliding_window from 1"),
        ({"sliding_window": 1 << 31}, "expected sliding_window from 1"),
        ({"sliding_window_pattern": 0}, "expected sliding_window_pattern from 1"),
        ({"sliding_window_pattern": "2"}, "expected sliding_window_pattern from 1"),
        ({"layer_types": ["full_attention"] * 5}, "expected 6 layer_types"),
        ({"layer_types": {"full_attention": 6}}, "of kind"),
    ],
)
def test_a_damaged_configuration_is_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        windows("gemma3_text", **setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"attention_chunk_size": None}, "expected attention_chunk_size from 1"),
        ({"no_rope_layers": [1, 0]}, "expected 6 no_rope_layers of 0 or 1"),
        ({"no_rope_layers": [2] * 6}, "expected 6 no_rope_layers of 0 or 1"),
        ({"no_rope_layers": "110"}, "expected 6 no_rope_layers of 0 or 1"),
        ({"layer_types": ["sliding_attention"] * 6}, "chunked_attention or full_attention"),
    ],
)
def test_damaged_chunks_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        windows("llama4_text", **setting)
