"""What packing at load takes: the bytes that facts predict, and little more than them while it lasts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the MLX engine needs the extra [mlx]")

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.placement import stage_cost
from cluster.types import Backend
from node.engine import LoadProgress
from node.engines.registry import create_engine
from tests.checkpoints import FAMILIES, MORE_FAMILIES, STATE_FAMILIES, make_checkpoint
from tests.converted import convert
from tests.oracle.pipelines import load_pipeline, stage_specs

BOTH = (*FAMILIES, *MORE_FAMILIES, *STATE_FAMILIES)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(("family", "backend"), [(family, backend) for backend in Backend for family in BOTH])
def test_a_stage_takes_what_its_facts_say(
    family: str, backend: Backend, bits: int | None, checkpoint: Callable[[str], Path]
) -> None:
    facts = read_facts(open_checkpoint(checkpoint(family)), bits)
    for spec in stage_specs(checkpoint(family), (2, 4), bits=bits):
        (engine,) = load_pipeline([lambda: create_engine(backend)], [spec])
        predicted = stage_cost(facts, spec.layers, backend, context=24, users=1, on_cpu=True).weight_bytes
        assert engine.capacity().weight_bytes == predicted
        engine.close()


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_a_stage_of_a_packed_checkpoint_takes_what_its_facts_say(
    family: str, mode: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = convert(checkpoint(family), tmp_path / "packed", bits=4, mode=mode)
    facts = read_facts(open_checkpoint(folder))
    for backend in facts.backends:
        for engine, spec in zip(
            load_pipeline([partial(create_engine, backend)] * 2, stage_specs(folder, (3,))),
            stage_specs(folder, (3,)),
            strict=True,
        ):
            predicted = stage_cost(facts, spec.layers, backend, context=24, users=1, on_cpu=True).weight_bytes
            assert engine.capacity().weight_bytes == predicted, backend


@pytest.mark.parametrize("backend", list(Backend))
def test_progress_rises_to_its_total(backend: Backend, checkpoint: Callable[[str], Path]) -> None:
    (spec,) = stage_specs(checkpoint("qwen3_moe"), (), bits=4)
    seen: list[LoadProgress] = []
    create_engine(backend).load(spec, seen.append)
    assert [report.done_bytes for report in seen] == sorted(report.done_bytes for report in seen)
    assert (seen[0].done_bytes, seen[-1].done_bytes) == (0, seen[0].total_bytes)


CONSTANT_BYTES = {Backend.TORCH: 8 << 20, Backend.MLX: 4 << 20}
"""What some rows are converted in, and on torch what the heap keeps of it, which varies by four megabytes from run to
run: it does not grow with the model."""

SIZES = {
    "llama": {"hidden_size": 1024, "intermediate_size": 3840},
    "qwen3_moe": {"hidden_size": 512, "moe_intermediate_size": 960},
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A checkpoint of some 220 MB in 16 bits, and a small one of the same family."""

    @cache
    def make(family: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(family)
        warm = make_checkpoint(family, root / "warm", dtype="bfloat16", moe_intermediate_size=64)
        return make_checkpoint(family, root / "large", layers=9, dtype="bfloat16", **SIZES[family]), warm

    return make


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("family", SIZES)
def test_a_load_never_holds_the_slice_in_full_precision(
    family: str, backend: Backend, large: Callable[[str], tuple[Path, Path]]
) -> None:
    """The packed slice, and a twentieth of it: no tensor is there as it is stored."""
    folder, warm = large(family)
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracle.peak_memory", str(folder), str(warm), backend, "4"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    growth_bytes, slice_bytes = map(int, done.stdout.split())
    checkpoint = open_checkpoint(folder)
    whole_bytes = sum(layer.resident_bytes[backend] for layer in read_facts(checkpoint).layers[:8])
    assert slice_bytes > 48 << 20
    assert growth_bytes <= 1.05 * slice_bytes + CONSTANT_BYTES[backend]
    assert growth_bytes < whole_bytes / 2
