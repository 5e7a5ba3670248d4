"""Full-precision checkpoints packed when they are loaded (`--bits`): the whole model with the same rounded numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.cli.verify import even_cut
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.types import Backend, LayerRange
from node.engine import Engine
from node.engines.mlx.engine import MlxEngine
from node.engines.mlx.reference import trace_whole_model as trace_by_mlx
from node.engines.registry import create_engine
from node.engines.torch.reference import trace_whole_model as trace_by_torch
from node.verification import Part, Subject, Verdict, verify
from tests.checkpoints import make_checkpoint
from tests.oracle.conftest import TOLERANCE
from tests.oracle.dequantised import dequantised
from tests.oracle.pipelines import greedy, load_pipeline, stage_specs
from tests.oracle.reference import LAST_TOKENS, Reference, WholeModel, decisive_reference, random_prompt
from tests.oracle.test_mixed import assert_equal
from tests.oracle.test_verify import DEVICES, TOKENS

Folders = Callable[[str, int], tuple[Path, Path]]

MLX = MlxEngine

FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "gemma3": {},
    "qwen3_moe": {"moe_intermediate_size": 64},
    "gpt_oss": {"intermediate_size": 64},
    "deepseek_v3": {"moe_intermediate_size": 64, "q_lora_rank": 64, "v_head_dim": 16},
}
"""With sizes that groups of 64 divide, so that all that is packed elsewhere is packed here."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A family's checkpoint, and the same one rounded to so many bits."""

    @cache
    def make(family: str, bits: int) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(f"{family}_{bits}")
        folder = make_checkpoint(family, root / "full", **FAMILIES[family])
        return folder, dequantised(folder, root / "rounded", bits)

    return make


@pytest.fixture(scope="module")
def expected(folders: Folders) -> Callable[[str, int], Reference]:
    @cache
    def make(family: str, bits: int) -> Reference:
        model = WholeModel(folders(family, bits)[1])
        return decisive_reference(model, prompt_tokens=40, count=LAST_TOKENS, tolerance=TOLERANCE)

    return make


@pytest.mark.parametrize(
    ("bits", "makers", "cuts"), [(4, (MLX, MLX, MLX), (2, 4)), (6, (MLX,), ()), (8, (MLX, MLX), (3,))]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_at_load_equals_the_whole_model_of_rounded_numbers(
    family: str,
    bits: int,
    makers: tuple[Callable[[], Engine], ...],
    cuts: tuple[int, ...],
    folders: Folders,
    expected: Callable[[str, int], Reference],
) -> None:
    answer = expected(family, bits)
    engines = load_pipeline(makers, stage_specs(folders(family, bits)[0], cuts, bits=bits))
    assert_equal(*greedy(engines, answer.prompt, len(answer.ids), chunks=(17,)), answer)


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
    verdict = verdict_of(folder, 4, (Backend.MLX,), reference)
    assert verdict.within
    assert verdict.worst_layer.error < verdict.worst_layer.tolerance / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_that_is_not_packed_finds_every_layer_wrong(family: str, folders: Folders) -> None:
    """So the comparisons above would notice weights that stay as they are stored."""
    folder, _ = folders(family, 4)
    facts = read_facts(open_checkpoint(folder), 4)
    whole = trace_by_torch(folder, replace(facts, bits=None), tuple(random_prompt(TOKENS, 3)), DEVICES[Backend.TORCH])
    parts = (Part(0, LayerRange(0, facts.layer_count), DEVICES[Backend.MLX]),)
    verdict = verify(Subject(folder, facts, parts), whole, create_engine, lambda what, done, total: None)
    assert not any(layer.within for layer in verdict.layers)
