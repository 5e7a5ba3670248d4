"""Random small plans, each run at its edge: every promise made is used in full.

Usage: python -m tests.oracle.memory_edges COUNT. Both engines run as many plans; `make rehearsal` asks for 200.

In float32: in 16 bits on a processor libraries keep products that they compiled, some of them as large as these models
(`tests.oracle.test_torch_kernels`).

Owns: the models and promises that a seed gives. Running them is `memory_peaks`.
"""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cluster.quantities import MIB
from cluster.types import Backend, LayerRange
from tests.checkpoints import make_checkpoint
from tests.oracle.memory_peaks import Run, measured

FAMILIES = ("llama", "qwen3", "qwen2", "gemma2", "gemma3", "phi3", "qwen3_moe", "gpt_oss", "olmo2", "deepseek_v3")

TOKENS = {Backend.TORCH: 2048, Backend.MLX: 192}
"""Cached by all users together, at most. MLX multiplies slowly on a processor."""


LIBRARY_BYTES = 16 * MIB
"""Beside a stage: what libraries keep for their products, and kernels for its shapes. It does not grow with the model,
is more than some of these models take, and nodes leave it to their reserve."""

_TOGETHER = 10
"""Plans run in one process."""


@dataclass(frozen=True, slots=True)
class Edge:
    """One model, and what is promised with a part of it."""

    seed: int
    family: str
    run: Run

    def __str__(self) -> str:
        layers, run = self.run.layers, self.run
        return f"seed {self.seed}: {self.family}, layers {layers}, {run.users} users of {run.context} tokens"


def warm_ups(backend: Backend, folder: Path) -> list[Path]:
    """A tiny model of every family and type: what a library does once for all is behind them."""
    dtypes = ("float32", "bfloat16") if backend is Backend.TORCH else ("float32",)
    return [
        make_checkpoint(family, folder / f"{family}-{dtype}", layers=6, dtype=dtype)
        for family in FAMILIES
        for dtype in dtypes
    ]


def edge(seed: int, backend: Backend, folder: Path) -> Edge:
    """The plan of this seed; its model is made in `folder`."""
    rng = random.Random(seed)
    family = rng.choice(FAMILIES)
    sizes: dict[str, object] = {
        "hidden_size": rng.choice([128, 256, 384, 512]),
        "intermediate_size": rng.choice([256, 512, 1024]),
        "vocab_size": rng.choice([1000, 4000, 16_000]),
    }
    if family not in ("deepseek_v3", "gpt_oss"):
        sizes["head_dim"] = int(str(sizes["hidden_size"])) // 4  # MLX computes no other with some families
    if family == "qwen3_moe":
        sizes["moe_intermediate_size"] = rng.choice([64, 128])
    layers = 6 if family in ("gemma3", "deepseek_v3") else rng.choice([2, 3, 4])
    make_checkpoint(family, folder, seed=seed, layers=layers, **sizes)
    first = rng.choice([0, 0, 1])
    last = rng.choice([layers, layers, layers - 1])
    users = rng.choice([1, 2, 3, 8])
    context = rng.randint(16, max(17, TOKENS[backend] // users))
    return Edge(seed, family, Run(folder, LayerRange(first, max(last, first + 1)), context, users))


def beyond(backend: Backend, seeds: range, warm: list[Path], folder: Path) -> list[str]:
    """The plans of these seeds whose stage took more than was promised."""
    edges = [edge(seed, backend, folder / f"{backend}-{seed}") for seed in seeds]
    found = measured(backend, warm, [each.run for each in edges])
    return [
        f"{backend}, {each}: {peaks['peak'] - peaks['predicted']} bytes too much, {peaks}"
        for each, peaks in zip(edges, found, strict=True)
        if peaks["peak"] > peaks["predicted"] + LIBRARY_BYTES
    ]


def main() -> int:
    count, failed = int(sys.argv[1]), 0
    for backend in Backend:
        with tempfile.TemporaryDirectory() as scratch:
            warm = warm_ups(backend, Path(scratch) / "warm")
            for begin in range(0, count, _TOGETHER):
                seeds = range(begin, min(begin + _TOGETHER, count))
                over = beyond(backend, seeds, warm, Path(scratch))
                failed += len(over)
                sys.stdout.write("\n".join([*over, f"{backend}: {seeds.stop} of {count} plans run, {failed} beyond\n"]))
                sys.stdout.flush()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
