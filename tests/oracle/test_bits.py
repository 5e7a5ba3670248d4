"""Full-precision checkpoints packed when they are loaded (`--bits`): the whole model with the same rounded numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

import mlx.core as mx

from cluster.cli.verify import even_cut
from cluster.errors import ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.types import Backend, LayerRange
from node.engine import Engine
from node.engines.mlx import quantising as mlx_packing
from node.engines.mlx.engine import MlxEngine
from node.engines.mlx.reference import trace_whole_model as trace_by_mlx
from node.engines.registry import create_engine
from node.engines.torch import quantising as torch_packing
from node.engines.torch.engine import TorchEngine
from node.engines.torch.reference import trace_whole_model as trace_by_torch
from node.verdict import Part, Verdict
from node.verification import Subject, verify
from tests.checkpoints import make_checkpoint
from tests.converted import convert
from tests.oracle import pipelines
from tests.oracle.company import assert_company_changes_nothing
from tests.oracle.conftest import TOLERANCE
from tests.oracle.dequantised import dequantised
from tests.oracle.pipelines import greedy, load_pipeline, run_prefill, stage_specs
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, decisive_reference, random_prompt
from tests.oracle.test_mixed import assert_equal
from tests.oracle.test_mlx_load import quantised
from tests.oracle.test_verify import DEVICES, TOKENS

Folders = Callable[[str, int], tuple[Path, Path]]

Maker = Callable[[], Engine]

MLX, TORCH = MlxEngine, TorchEngine

FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "gemma3": {},
    "qwen3_moe": {"moe_intermediate_size": 64},
    "gpt_oss": {"intermediate_size": 64},
    "deepseek_v3": {"moe_intermediate_size": 64, "q_lora_rank": 64, "v_head_dim": 16},
}
"""With sizes that groups of 64 divide, so that all that is packed elsewhere is packed here."""

MORE: dict[str, dict[str, object]] = {
    "phi3": {},
    "gemma4": {"moe_intermediate_size": 64},
    "gemma4_small": {"hidden_size_per_layer_input": 64},
    "qwen3_next": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "linear_value_head_dim": 16},
    "qwen3_5_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "lfm2": {},
    "llama4": {"intermediate_size": 64, "intermediate_size_mlp": 128},
}
"""Each has matrices that the others have not."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A family's checkpoint, and the same one rounded to so many bits."""

    @cache
    def make(family: str, bits: int) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(f"{family}_{bits}")
        folder = make_checkpoint(family, root / "full", **(FAMILIES | MORE)[family])
        return folder, dequantised(folder, root / "rounded", bits)

    return make


@pytest.fixture(scope="module")
def expected(folders: Folders) -> Callable[[str, int], Reference]:
    @cache
    def make(family: str, bits: int) -> Reference:
        model = WholeModel(folders(family, bits)[1])
        return decisive_reference(model, prompt_tokens=40, count=LAST_TOKENS, tolerance=TOLERANCE)

    return make


PIPELINES: list[tuple[int, tuple[str, ...], tuple[Maker, ...]]] = [
    *((4, tuple(FAMILIES), makers) for makers in ((MLX, MLX, MLX), (TORCH,), (TORCH, MLX, TORCH), (MLX, TORCH))),
    *((4, tuple(MORE), makers) for makers in ((TORCH,), (MLX, MLX), (TORCH, MLX, TORCH))),
    *((6, ("llama", "gpt_oss"), makers) for makers in ((MLX,), (TORCH, TORCH), (MLX, TORCH, MLX))),
    *((8, ("gemma3", "qwen3_moe"), makers) for makers in ((MLX, MLX), (TORCH, TORCH, TORCH), (TORCH, MLX))),
]
CUTS: dict[int, tuple[int, ...]] = {1: (), 2: (3,), 3: (2, 4)}


@pytest.mark.parametrize(
    ("family", "bits", "makers"),
    [(family, bits, makers) for bits, families, makers in PIPELINES for family in families],
)
def test_packed_at_load_equals_the_whole_model_of_rounded_numbers(
    family: str,
    bits: int,
    makers: tuple[Maker, ...],
    folders: Folders,
    expected: Callable[[str, int], Reference],
) -> None:
    answer = expected(family, bits)
    engines = load_pipeline(makers, stage_specs(folders(family, bits)[0], CUTS[len(makers)], bits=bits))
    assert_equal(*greedy(engines, answer.prompt, len(answer.ids), chunks=(17,)), answer)


@pytest.mark.parametrize("makers", [(TORCH,), (MLX,), (MLX, TORCH)])
@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("llama", 6), ("llama", 8), ("qwen3_moe", 4)])
def test_neighbours_in_a_step_change_nothing(
    family: str, bits: int, makers: tuple[Maker, ...], folders: Folders, expected: Callable[[str, int], Reference]
) -> None:
    assert_company_changes_nothing(makers, folders(family, bits)[0], expected(family, bits), bits=bits)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_what_mlx_lm_converted_without_packing_is_packed_alike(
    family: str, folders: Folders, expected: Callable[[str, int], Reference], tmp_path: Path
) -> None:
    """Experts are stacked there, and what expands latents is cut by head and turned."""
    answer = expected(family, 4)
    folder = convert(folders(family, 4)[0], tmp_path / "converted")
    engines = load_pipeline((MLX, TORCH), stage_specs(folder, (3,), bits=4))
    assert_equal(*greedy(engines, answer.prompt, len(answer.ids)), answer)


def _misplaced_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group is scaled as its neighbour is, in torch and in MLX."""
    put, convert = torch_packing._put, mlx_packing.Packed.convert
    monkeypatch.setattr(torch_packing, "_put", lambda steps, bits, codes: put(steps.roll(1, dims=0), bits, codes))

    def converted(form: mlx_packing.Packed, numbers: mx.array, first: int) -> tuple[mx.array, ...]:
        codes, scales, biases = convert(form, numbers, first)
        return codes, mx.roll(scales, 1, 0), biases

    monkeypatch.setattr(mlx_packing.Packed, "convert", converted)


def _unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights stay as they are stored."""
    monkeypatch.setattr(pipelines, "read_facts", lambda checkpoint, bits: read_facts(checkpoint))


@pytest.mark.parametrize("mutate", [_misplaced_scales, _unpacked])
@pytest.mark.parametrize("make", [TORCH, MLX])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_mutants_fail_the_check(
    family: str,
    make: Maker,
    mutate: Callable[[pytest.MonkeyPatch], None],
    folders: Folders,
    expected: Callable[[str, int], Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = expected(family, 4)
    mutate(monkeypatch)
    engines = load_pipeline([make], pipelines.stage_specs(folders(family, 4)[0], (), bits=4))
    with pytest.raises(AssertionError):
        assert_equal(*greedy(engines, answer.prompt, len(answer.ids)), answer)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_16_bits_torch_rounds_no_more_than_the_whole_model(family: str, tmp_path: Path) -> None:
    """Packed or not, activations are rounded; codes, scales and biases give the same numbers in both."""
    folder = make_checkpoint(family, tmp_path / "full", dtype="bfloat16")
    prompts = [random_prompt(40, seed) for seed in range(6)]
    exact = WholeModel(dequantised(folder, tmp_path / "rounded", 4))
    engines = load_pipeline([TORCH, TORCH], stage_specs(folder, (3,), bits=4))
    found = [
        run_prefill(engines, prompt, (13,), seq=seq) - exact.logits(prompt)[-1] for seq, prompt in enumerate(prompts)
    ]
    plain = WholeModel(folder)
    as_stored = [plain.logits(prompt)[-1] for prompt in prompts]
    plain.in_float32()
    rounding = [plain.logits(prompt)[-1] - logits for prompt, logits in zip(prompts, as_stored, strict=True)]
    assert np.abs(found).mean() < 1.5 * np.abs(rounding).mean()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_in_16_bits_mlx_computes_what_mlx_lm_does(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, dtype="bfloat16", **FAMILIES[family])
    verdict = verdict_of(folder, 4, (Backend.MLX,), Backend.MLX)
    assert verdict.chain.error == 0


def verdict_of(folder: Path, bits: int, backends: Sequence[Backend], reference: Backend) -> Verdict:
    facts = read_facts(open_checkpoint(folder), bits)
    parts = [Part(i, cut, DEVICES[backends[i % len(backends)]]) for i, cut in enumerate(even_cut(facts, 2))]
    trace = trace_by_torch if reference is Backend.TORCH else trace_by_mlx
    traced = trace(folder, facts, tuple(random_prompt(TOKENS, 3)), DEVICES[reference])
    return verify(Subject(folder, facts, tuple(parts)), traced, create_engine, lambda what, done, total: None)


@pytest.mark.parametrize(
    ("family", "reference"),
    # mlx-lm rotates gpt-oss' positions otherwise, packed or not, and does not read transformers' files of it.
    [*product(FAMILIES, [Backend.TORCH]), *product([name for name in FAMILIES if name != "gpt_oss"], [Backend.MLX])],
)
def test_verify_compares_with_the_model_as_it_is_packed(family: str, reference: Backend, folders: Folders) -> None:
    folder, _ = folders(family, 4)
    verdict = verdict_of(folder, 4, (Backend.MLX, Backend.TORCH), reference)
    assert verdict.within
    assert verdict.worst_layer.error < verdict.worst_layer.tolerance / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_that_is_not_packed_finds_every_layer_wrong(family: str, folders: Folders) -> None:
    """So the comparisons above would notice weights that stay as they are stored."""
    folder, _ = folders(family, 4)
    facts = read_facts(open_checkpoint(folder), 4)
    stored = read_facts(open_checkpoint(folder))
    whole = trace_by_torch(folder, stored, tuple(random_prompt(TOKENS, 3)), DEVICES[Backend.TORCH])
    parts = (Part(0, LayerRange(0, facts.layer_count), DEVICES[Backend.MLX]),)
    verdict = verify(Subject(folder, facts, parts), whole, create_engine, lambda what, done, total: None)
    assert not any(layer.within for layer in verdict.layers)


@pytest.mark.parametrize("make", [TORCH, MLX])
def test_a_stage_does_not_pack_what_is_packed_already(
    make: Maker, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = quantised(checkpoint("llama"), tmp_path / "packed")
    (as_stored,) = stage_specs(folder, ())
    with pytest.raises(ModelError, match="the weights are packed already"):
        load_pipeline([make], [replace(as_stored, bits=8)])
    load_pipeline([make], [replace(as_stored, bits=4)])
