"""What a GGUF file becomes is known from its header alone, and what cannot be converted exactly is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.types import DType
from coordinator.gguf.convert import convert
from coordinator.gguf.layout import Layout, lay_out
from coordinator.gguf.source import find_gguf, open_gguf
from tests.gguf_blocks import stored
from tests.gguf_files import Stored
from tests.gguf_paper import HEAD_DIM, METADATA, paper_gguf, paper_tensors


def layout_of(tmp_path: Path, changed: dict[str, object] | None = None, **tensors: Stored | None) -> Layout:
    """The paper model with some metadata and tensors changed (`__` stands for a dot); None removes one."""
    everything: dict[str, Any] = paper_tensors() | {name.replace("__", "."): t for name, t in tensors.items()}
    kept = {name: tensor for name, tensor in everything.items() if tensor is not None}
    return lay_out(open_gguf(paper_gguf(tmp_path / "paper.gguf", changed, kept)))


def refusal(tmp_path: Path, changed: dict[str, object] | None = None, **tensors: Stored | None) -> str:
    with pytest.raises(ModelError) as caught:
        layout_of(tmp_path, changed, **tensors)
    return str(caught.value)


def vector(*values: float) -> Stored:
    return stored(np.array(values, np.float32), "F32")


def test_the_plan_is_what_is_written(tmp_path: Path) -> None:
    layout = layout_of(tmp_path)
    convert(layout, {}, tmp_path / "made")
    made = open_checkpoint(tmp_path / "made")
    assert dict(made.tensors) == dict(layout.checkpoint().tensors)
    assert made.config == layout.config
    assert read_facts(made) == read_facts(layout.checkpoint())


def test_each_matrix_keeps_the_bits_of_its_codes(tmp_path: Path) -> None:
    layout = layout_of(tmp_path, blk__1__ffn_up__weight=stored(np.ones((32, 256), np.float32), "Q5_K"))
    stated: Any = layout.config["quantization"]
    eights = {name for name, how in stated.items() if isinstance(how, dict) and how["bits"] == 8}
    assert (stated["bits"], stated["group_size"], stated["mode"]) == (4, 32, "affine")
    assert eights == {f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert stated["model.layers.1.mlp.up_proj"] == {"group_size": 32, "bits": 5, "mode": "affine"}


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (("Q4_K", "Q8_0"), DType.F16),
        (("F32", "F32"), DType.F32),
        (("F16", "F16"), DType.F16),
        (("BF16", "BF16"), DType.BF16),
        (("BF16", "Q8_0"), DType.F16),
    ],
)
def test_the_type_to_compute_in_follows_from_the_matrices(kinds: tuple[str, str], dtype: DType, tmp_path: Path) -> None:
    layout = lay_out(open_gguf(paper_gguf(tmp_path / "x.gguf", None, paper_tensors(*kinds))))
    assert layout.dtype is dtype
    assert read_facts(layout.checkpoint()).dtype is dtype


def test_a_head_that_is_not_stored_is_tied(tmp_path: Path) -> None:
    assert layout_of(tmp_path).config["tie_word_embeddings"] is True
    head = stored(np.ones((16, 256), np.float32), "Q6_K")
    assert layout_of(tmp_path, output__weight=head).config["tie_word_embeddings"] is False


def test_float32_settings_are_read_as_people_write_them(tmp_path: Path) -> None:
    assert layout_of(tmp_path).config["rms_norm_eps"] == 1e-5


def llama3(factor: float, original: int, theta: float) -> list[float]:
    factors = []
    for pair in range(HEAD_DIM // 2):
        turns = original / (2 * math.pi * theta ** (2 * pair / HEAD_DIM))
        share = (turns - 1) / 3
        factors.append(1.0 if share > 1 else factor if share < 0 else 1 / ((1 - share) / factor + share))
    return factors


def test_llama_3_rotations_are_recognised_by_their_factors(tmp_path: Path) -> None:
    factors = llama3(8.0, 1024, 10_000.0)
    assert len(set(factors)) >= 3  # one of them between the ends, which tells the context
    config: Any = layout_of(tmp_path, rope_freqs__weight=vector(*factors)).config
    assert config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }


def test_factors_of_no_known_rotation_are_refused(tmp_path: Path) -> None:
    assert "no Llama 3 rotation" in refusal(tmp_path, rope_freqs__weight=vector(1.0, 2.0, 3.0, 8.0))
    assert "no Llama 3 rotation" in refusal(tmp_path, rope_freqs__weight=vector(1.0, 8.0))


@pytest.mark.parametrize("odd", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_factors_are_refused(odd: float, tmp_path: Path) -> None:
    assert "no Llama 3 rotation" in refusal(tmp_path, rope_freqs__weight=vector(1.0, 1.0, 1.0, odd))
    renamed = {key: None for key in METADATA if key.startswith("llama.")}
    settings = {key.replace("llama.", "phi3."): METADATA[key] for key in renamed} | {"general.architecture": "phi3"}
    factors = {f"rope_factors_{kind}__weight": vector(1.0, 1.0, 1.0, odd) for kind in ("short", "long")}
    assert "factors of the rotation above 0" in refusal(tmp_path, {**renamed, **settings}, **factors)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_stretched_rotations_are_kept(kind: str, tmp_path: Path) -> None:
    there = "llama.rope.scaling"
    stated = {f"{there}.type": kind, f"{there}.factor": 4.0, f"{there}.finetuned": True}
    original = {} if kind == "linear" else {"original_max_position_embeddings": 128}
    config: Any = layout_of(tmp_path, stated | ({f"{there}.original_context_length": 128} if original else {})).config
    assert config["rope_parameters"] == {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **original}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"general.architecture": "mamba"}, "the architecture 'mamba' is not converted from GGUF; converted are Llama"),
        ({"general.type": "adapter"}, "holds no model but its 'adapter'"),
        ({"llama.expert_count": 8}, "Mixtral"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5, a setting that Potluck does not know"),
        ({"llama.attention.value_length": 4}, "attention.value_length is 4"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4"),
        ({"llama.rope.scaling.type": "dynamic", "llama.rope.scaling.factor": 2.0}, "'dynamic'"),
        ({"llama.attention.head_count": [4, 2]}, "the same number for all layers"),
        ({"llama.attention.causal": False}, "attends to what comes later"),
        ({"llama.block_count": None}, "expected llama.block_count in its metadata, found none"),
        ({"llama.context_length": "512"}, "a whole number"),
        ({"llama.rope.freq_base": float("nan")}, "expected llama.rope.freq_base to be a number"),
        ({"split.count": 3}, "is one of 3 files"),
        (
            {f"tokenizer.ggml.{name}": None for name in ("scores", "token_type")}
            | {"tokenizer.ggml.tokens": [f"t{i}" for i in range(17)]},
            "has 17 tokens, but an embedding of 16",
        ),
    ],
)
def test_metadata_that_is_not_understood_is_refused(changed: dict[str, object], said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, changed)


def test_settings_that_are_off_are_no_obstacle(tmp_path: Path) -> None:
    assert layout_of(tmp_path, {"llama.expert_count": 0, "llama.attention.clamp_kqv": 0.0}).config


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    assert "'blk.0.ssm_in.weight' is none of Llama" in refusal(tmp_path, blk__0__ssm_in__weight=vector(1.0))
    assert "'v.patch.weight' is none of Llama" in refusal(tmp_path, v__patch__weight=vector(1.0))
    assert "expected the tensor token_embd.weight" in refusal(tmp_path, token_embd__weight=None)


def test_a_packed_vector_is_refused(tmp_path: Path) -> None:
    packed = stored(np.ones(256, np.float32), "Q8_0")
    assert "is no matrix, but stored as Q8_0" in refusal(tmp_path, output_norm__weight=packed)
    both = stored(np.ones((32, 256), np.float32), "Q8_0")
    assert "is no matrix, but stored as Q8_0" in refusal(tmp_path, blk__0__attn_q__bias=both)


def test_two_tensors_may_not_become_one(tmp_path: Path) -> None:
    metadata = {key.replace("llama.", "gpt-oss."): value for key, value in METADATA.items()}
    more = {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 32, "attention.sliding_window": 8}
    metadata |= {"general.architecture": "gpt-oss", **{f"gpt-oss.{name}": value for name, value in more.items()}}
    tensors = {name: tensor for name, tensor in paper_tensors().items() if "ffn" not in name}
    sinks = {f"blk.0.attn_sinks.{kind}": vector(1.0, 1.0, 1.0, 1.0) for kind in ("weight", "bias")}
    dropped = {key: None for key in METADATA if key.startswith("llama.")}
    with pytest.raises(ModelError, match=r"two of its tensors would become model\.layers\.0\.self_attn\.sinks"):
        lay_out(open_gguf(paper_gguf(tmp_path / "x.gguf", dropped | metadata, tensors | sinks)))


def test_rows_that_are_no_whole_heads_are_refused(tmp_path: Path) -> None:
    odd = stored(np.ones((30, 256), np.float32), "Q8_0")
    assert "no 4 heads" in refusal(tmp_path, blk__0__attn_q__weight=odd)


# -- Which files -----------------------------------------------------------------------------------------


def split_set(folder: Path, count: int = 2) -> list[Path]:
    tensors = list(paper_tensors().items())
    paths = []
    for number in range(count):
        own = dict(tensors[number::count])
        first = {"split.count": count} if number == 0 else dict.fromkeys(METADATA)
        path = folder / f"paper-{number + 1:05}-of-{count:05}.gguf"
        paths.append(paper_gguf(path, {**first, "split.no": number}, own))
    return paths


def test_a_split_set_is_one_model_whichever_part_is_named(tmp_path: Path) -> None:
    whole = paper_gguf(tmp_path / "whole" / "paper.gguf")
    expected = {name: tensor.shape for name, tensor in lay_out(open_gguf(whole)).checkpoint().tensors.items()}
    for part in split_set(tmp_path / "set", 3):
        found = lay_out(open_gguf(part)).checkpoint().tensors
        assert {name: tensor.shape for name, tensor in found.items()} == expected


def test_a_set_with_a_part_missing_says_which(tmp_path: Path) -> None:
    parts = split_set(tmp_path / "set")
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"paper-00002-of-00002\.gguf is missing"):
        open_gguf(parts[0])


def test_a_folder_is_the_only_model_in_it(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None
    parts = split_set(tmp_path)
    (tmp_path / "mmproj-model-f16.gguf").touch()
    assert find_gguf(tmp_path) == parts[0]
    paper_gguf(tmp_path / "other.gguf")
    with pytest.raises(ModelError, match="holds 2 models"):
        find_gguf(tmp_path)
