"""Models that came as GGUF compute what transformers computes with the same weights, unpacked on their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.models.gguf_types import GgmlType
from cluster.types import Backend, DType
from coordinator.gguf import architectures, layout
from coordinator.gguf import convert as converting
from coordinator.gguf.blocks import Affine, Bytes, affine
from coordinator.gguf.convert import convert
from coordinator.gguf.layout import Step, lay_out
from coordinator.gguf.source import open_gguf
from coordinator.gguf.store import ConversionStore
from coordinator.gguf.tokenizer import tokenizer_files
from node.engines.registry import create_engine
from tests.checkpoints import make_checkpoint
from tests.gguf_models import WIDE, as_q4_k_m, write_model
from tests.oracle import ledger
from tests.oracle.company import assert_company_changes_nothing
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import greedy, load_pipeline, run_prefill, stage_specs
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, assert_same, decisive_reference

LAYERS = 3

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 50_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
}
YARN = {"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0, "original_max_position_embeddings": 1024}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 64}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {"sliding_window_pattern": 2}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "intermediate_size": 64}),
    "phi3": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 128}),
}


PACKED = [
    ("llama", "Q4_K_M"),
    ("qwen3_moe", "Q4_K_M"),
    ("gemma3", "Q4_K_M"),  # the embedding is packed, and is the head
    ("phi3", "the rest"),
    ("qwen2", "the rest"),
    ("gpt_oss", "mxfp4"),
]

STAGES = [
    (Backend.TORCH, Backend.TORCH),
    (Backend.MLX, Backend.MLX, Backend.MLX),
    (Backend.TORCH, Backend.MLX),
    (Backend.MLX, Backend.TORCH),
]


@dataclass(frozen=True, slots=True)
class Written:
    """A GGUF file, and what transformers answers with the same weights."""

    path: Path
    expected: Reference


Make = Callable[[str, str], Written]


def as_the_rest(name: str) -> str:
    """The types that the popular recipe has not."""
    kinds = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "attn_output": "Q5_1", "ffn_gate": "Q5_K"}
    return kinds.get(name.split(".")[-2], "Q8_0")


def as_popular(name: str) -> str:
    """Rows of experts' last matrices are too short for nested blocks."""
    return "Q5_0" if "ffn_down_exps" in name else as_q4_k_m(name)


def as_gpt_oss(name: str) -> str:
    """As it is published: the experts alone in four bits."""
    return "MXFP4" if "_exps" in name else "Q8_0"


RECIPES = {"F32": lambda name: "F32", "Q4_K_M": as_popular, "the rest": as_the_rest, "mxfp4": as_gpt_oss}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    @cache
    def made(model: str, recipe: str) -> Written:
        family, overrides = MODELS[model]
        folder = tmp_path_factory.mktemp("gguf")
        source = make_checkpoint(family, folder / "source", layers=LAYERS, **{**WIDE, **overrides})
        path = write_model(source, folder / "gguf" / "tiny.gguf", RECIPES[recipe])
        whole = WholeModel(path.parent / "unpacked").in_float32()
        return Written(path, decisive_reference(whole, prompt_tokens=40, count=LAST_TOKENS, tolerance=TOLERANCE))

    return made


def in_float32(written: Written, folder: Path) -> Path:
    """The folder that the file becomes, scales in float32, so that nothing is rounded on the way."""
    files = open_gguf(written.path)
    plan = lay_out(files, dtype=DType.F32)
    convert(plan, tokenizer_files(files.facts), folder / "converted")
    matrices = {step.source.type.name for step in plan.steps if len(step.source.shape) > 1}
    ledger.name_format(folder / "converted", f"GGUF {', '.join(sorted(matrices))}")
    return folder / "converted"


def run(folder: Path, expected: Reference, backends: tuple[Backend, ...]) -> None:
    cuts = {1: (), 2: (2,), 3: (1, 2)}[len(backends)]
    makers = [partial(create_engine, backend) for backend in backends]
    engines = load_pipeline(makers, stage_specs(folder, cuts, context_tokens=128))
    ids, logits = greedy(engines, expected.prompt, len(expected.ids), chunks=(17,))
    assert_same(ids, logits, expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("backends", STAGES, ids="-".join)
@pytest.mark.parametrize("model", MODELS)
def test_unpacked_files_of_each_architecture(
    model: str, backends: tuple[Backend, ...], make: Make, tmp_path: Path
) -> None:
    written = make(model, "F32")
    run(in_float32(written, tmp_path), written.expected, backends)


@pytest.mark.parametrize("backends", STAGES, ids="-".join)
@pytest.mark.parametrize(("model", "recipe"), PACKED)
def test_packed_files_mean_exactly_what_their_blocks_do(
    model: str, recipe: str, backends: tuple[Backend, ...], make: Make, tmp_path: Path
) -> None:
    written = make(model, recipe)
    folder = in_float32(written, tmp_path)
    assert read_facts(open_checkpoint(folder)).backends == set(Backend)
    run(folder, written.expected, backends)


@pytest.mark.parametrize("backends", [(Backend.TORCH,), (Backend.MLX,), (Backend.MLX, Backend.TORCH)], ids="-".join)
@pytest.mark.parametrize(("model", "recipe"), [("llama", "F32"), *PACKED])
def test_neighbours_in_a_step_change_nothing(
    model: str, recipe: str, backends: tuple[Backend, ...], make: Make, tmp_path: Path
) -> None:
    written = make(model, recipe)
    makers = [partial(create_engine, backend) for backend in backends]
    assert_company_changes_nothing(makers, in_float32(written, tmp_path), written.expected, context_tokens=128)


@pytest.mark.parametrize("backend", list(Backend))
def test_in_the_type_that_it_computes_in_the_answer_stays_near(backend: Backend, make: Make, tmp_path: Path) -> None:
    """Scales rounded to float16 as serving has them; on a processor MLX also adds up in float16."""
    written = make("llama", "Q4_K_M")
    folder = ConversionStore(tmp_path).make(written.path)
    [engine] = load_pipeline([partial(create_engine, backend)], stage_specs(folder, (), context_tokens=128))
    found, exact = run_prefill([engine], written.expected.prompt), written.expected.logits[0]
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.03 * np.sqrt(np.mean(exact**2))
    assert int(found.argmax()) == written.expected.ids[0]


# -- Mutants ---------------------------------------------------------------------------------------------


def neighbouring_minima(kind: GgmlType, rows: Bytes) -> Affine:
    parts = affine(kind, rows)
    return replace(parts, biases=np.roll(parts.biases, 1, axis=1))


MUTANTS = {
    "rows in the order of the file": ("llama", "F32", converting, "halves_apart", lambda rows, head_rows: rows),
    "minima of the group beside": ("llama", "Q4_K_M", converting, "affine", neighbouring_minima),
    "a plain rotation": ("llama", "F32", architectures, "scaling", lambda files, prefix, head_dim: None),
    "norms with the one": ("gemma3", "F32", layout, "Step", lambda *a: Step(*a[:5], False)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_conversion_is_noticed(
    mutant: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe, module, name, wrong = MUTANTS[mutant]
    written = make(model, recipe)
    monkeypatch.setattr(module, name, wrong)
    folder = in_float32(written, tmp_path)
    with pytest.raises(AssertionError):
        run(folder, written.expected, (Backend.MLX,))
