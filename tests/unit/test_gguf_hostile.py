"""Metadata that nobody vouches for becomes a model that can be planned, or a ModelError; never anything else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ModelError
from cluster.models.facts import read_facts
from cluster.models.gguf_header import GgufTensor, Value
from cluster.models.gguf_types import GgmlType
from coordinator.gguf import architectures
from coordinator.gguf.layout import lay_out
from coordinator.gguf.source import GgufFiles, Metadata
from coordinator.gguf.tokenizer import tokenizer_files
from tests.gguf_paper import METADATA, paper_tensors

PLACES = {
    name: (Path("x.gguf"), GgufTensor(name, GgmlType[kind], shape, 0, 0))
    for name, (kind, shape, _) in paper_tensors().items()
}
ODD = (0, 1, 2, 3, 7, 255, 1 << 31, 1 << 62, -1, True, False, 0.0, -1.0, 1e-30, 1e30, 1e308, float("nan"), float("inf"))

KINDS = architectures._kinds

VECTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
ODD_FLOATS = (1.0, 8.0, 0.0, -1.0, 1e-30, float("nan"), float("inf"))


@dataclass(frozen=True, slots=True)
class Rotated(GgufFiles):
    """Files whose small tensors are at hand."""

    vectors: Mapping[str, list[float]]

    def vector(self, name: str) -> tuple[float, ...] | None:
        return tuple(self.vectors[name]) if name in self.vectors else None


SETTINGS: dict[str, dict[str, Value]] = {
    arch: {
        f"{arch}.{name}": 1
        for name in (
            "attention.value_length", "attention.sliding_window", "attention.sliding_window_pattern", "expert_count",
            "expert_used_count", "expert_feed_forward_length", "rope.dimension_count", "rope.freq_base_swa",
            "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
            "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "attn_logit_softcapping",
        )
    }
    for arch in ("llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "gpt-oss")
}  # fmt: skip

values = st.one_of(
    st.sampled_from(ODD),
    st.text(max_size=4),
    st.sampled_from(["linear", "yarn", "none", "gpt2", "llama", "qwen2", "<s>", "a b"]),
    st.lists(st.sampled_from(ODD), max_size=3).map(tuple),
    st.lists(st.text(max_size=3), max_size=3).map(tuple),
)


def of_architecture(arch: str) -> dict[str, Value]:
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in METADATA.items()}
    renamed: dict[str, Value] = {key.replace("llama.", f"{arch}."): value for key, value in plain.items()}  # type: ignore[misc]
    return {**renamed, "general.architecture": arch}


@settings(max_examples=300)
@given(st.data())
def test_odd_settings_are_refused_or_planned(data: st.DataObject) -> None:
    arch = data.draw(st.sampled_from(sorted(SETTINGS)))
    metadata = of_architecture(arch)
    keys = st.sampled_from(sorted(metadata.keys() | SETTINGS[arch].keys()))
    metadata |= data.draw(st.dictionaries(keys, values, min_size=1, max_size=3))
    floats = st.lists(st.sampled_from(ODD_FLOATS), min_size=4, max_size=4)
    vectors = data.draw(st.dictionaries(st.sampled_from(VECTORS), floats))
    files = Rotated("x", (Path("x.gguf"),), Metadata(metadata, "x.gguf"), PLACES, vectors)
    try:
        read_facts(lay_out(files).checkpoint())
    except ModelError:
        return


@given(st.data())
def test_odd_tokenizers_are_refused_or_made(data: st.DataObject) -> None:
    metadata = of_architecture(data.draw(st.sampled_from(["llama", "phi3"])))
    keys = [key for key in metadata if key.startswith("tokenizer.")]
    more = [f"tokenizer.ggml.{name}" for name in ("merges", "pre", "add_bos_token", "eot_token_id", "add_space_prefix")]
    metadata |= data.draw(st.dictionaries(st.sampled_from([*keys, *more]), values, min_size=1, max_size=3))
    try:
        assert tokenizer_files(Metadata(metadata, "x.gguf"))["tokenizer.json"]
    except ModelError:
        return


@pytest.mark.parametrize(
    ("arch", "odd", "named"),
    [
        ("gemma3", {"block_count": (1 << 32) - 1}, "block_count to be a whole number from 1 to 4095, found 4294967295"),
        ("gpt-oss", {"block_count": (1 << 32) - 1}, "block_count to be a whole number from 1 to 4095"),
        ("gemma2", {"block_count": 46, "attention.head_count": 0}, "head_count to be a whole number from 1, found 0"),
        ("gemma3", {"block_count": 62, "attention.head_count": 0}, "head_count to be a whole number from 1, found 0"),
        (
            "phi3",
            {"attention.key_length": 0, "rope.dimension_count": 8},
            "key_length to be a whole number from 1, found 0",
        ),
        ("llama", {"rope.freq_base": 1e308}, "rope.freq_base to be a number that float32 can hold"),
    ],
)
def test_a_setting_that_nothing_can_be_made_of_is_refused_by_name(
    arch: str, odd: Mapping[str, Value], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architectures, "_kinds", counted_kinds)
    metadata = of_architecture(arch) | {f"{arch}.attention.sliding_window": 4, f"{arch}.expert_count": 0}
    metadata |= {f"{arch}.expert_feed_forward_length": 4, f"{arch}.expert_used_count": 0}
    metadata |= {f"{arch}.{name}": value for name, value in odd.items()}
    with pytest.raises(ModelError, match=re.escape(named)):
        lay_out(Rotated("x", (Path("x.gguf"),), Metadata(metadata, "x.gguf"), PLACES, {}))


def counted_kinds(pattern: object, silent: int, layers: int, where: str) -> list[str]:
    """In place of a list that would take all memory of the machine that tests run on."""
    assert layers < 1 << 12
    return KINDS(pattern, silent, layers, where)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e308])
def test_a_kind_of_token_that_is_no_whole_number_is_refused(odd: float) -> None:
    metadata = of_architecture("llama")
    metadata["tokenizer.ggml.token_type"] = (odd, *(1,) * 15)
    with pytest.raises(ModelError, match="token_type to be a list of whole numbers"):
        tokenizer_files(Metadata(metadata, "x.gguf"))


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_without_odd_settings_it_is_planned(arch: str) -> None:
    """Else the test above might refuse everything for one and the same reason."""
    files = Rotated("x", (Path("x.gguf"),), Metadata(of_architecture(arch), "x.gguf"), PLACES, {})
    assert read_facts(lay_out(files).checkpoint()).layer_count == 2
