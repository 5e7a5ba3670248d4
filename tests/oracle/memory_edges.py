"""Random small plans, each run at its edge: every promise made is used in full.

Usage: python -m tests.oracle.memory_edges COUNT. Both engines run as many plans; `make rehearsal` asks for 200.

On torch in float32, in 16 bits, and packed at load. Owns: the models and promises that a seed gives. Running them is
`memory_peaks`.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from cluster.quantities import MIB
from cluster.types import Backend, LayerRange
from tests.checkpoints import make_checkpoint
from tests.oracle.memory_peaks import Run, measured

FAMILIES = ("llama", "qwen3", "qwen2", "gemma2", "gemma3", "phi3", "qwen3_moe", "gpt_oss", "olmo2", "deepseek_v3")
MORE_FAMILIES = ("mistral", "olmo3", "glm4", "gemma4", "gemma4_small", "llama4", "qwen3_next", "qwen3_5", "lfm2")

STORED: Mapping[Backend, Sequence[tuple[str, int | None]]] = {
    Backend.TORCH: (("float32", None), ("bfloat16", None), ("bfloat16", 4), ("bfloat16", 8)),
    Backend.MLX: (("float32", None),),
}
"""The type of a checkpoint, and the bits that it is packed in at load."""

TOKENS = {Backend.TORCH: 2048, Backend.MLX: 192}
"""Cached by all users together, at most. MLX multiplies slowly on a processor."""


LIBRARY_BYTES = 16 * MIB
"""Beside a stage: what libraries keep for their products, and kernels for its shapes. It does not grow with the model,
is more than some of these models take, and nodes leave it to their reserve."""

LARGE_BYTES, FLOOR = 64 * MIB, 0.4
"""Plans from this size on take such a share of what was promised at least; below, what is fixed decides."""

_TOGETHER = 10
"""Plans run in one process."""


@dataclass(frozen=True, slots=True)
class Edge:
    """One model, and what is promised with a part of it."""

    seed: int
    family: str
    dtype: str
    run: Run

    def __str__(self) -> str:
        layers, run = self.run.layers, self.run
        stored = self.dtype if run.bits is None else f"{run.bits} bits"
        return (
            f"seed {self.seed}: {self.family} in {stored}, layers {layers}, {run.users} users of {run.context} tokens"
        )


def warm_ups(backend: Backend, folder: Path) -> list[Path]:
    """A tiny model of every family, and of every type: what a library does once for all is behind them."""
    made = [(family, STORED[backend][-1][0]) for family in _families(backend)]
    made += [(family, "float32") for family in ("llama", "qwen3_moe") if (family, "float32") not in made]
    return [make_checkpoint(family, folder / f"{family}-{dtype}", layers=6, dtype=dtype) for family, dtype in made]


def _families(backend: Backend) -> Sequence[str]:
    return (*FAMILIES, *MORE_FAMILIES) if backend is Backend.TORCH else FAMILIES


def edge(seed: int, backend: Backend, folder: Path) -> Edge:
    """The plan of this seed; its model is made in `folder`."""
    rng = random.Random(seed)
    family = rng.choice(_families(backend))
    dtype, bits = random.Random(f"stored {seed}").choice(STORED[backend])
    sizes: dict[str, object] = {
        "hidden_size": rng.choice([128, 256, 384, 512]),
        "intermediate_size": rng.choice([256, 512, 1024]),
        "vocab_size": rng.choice([1000, 4000, 16_000]),
    }
    if family not in ("deepseek_v3", "gpt_oss"):
        sizes["head_dim"] = int(str(sizes["hidden_size"])) // 4  # MLX computes no other with some families
    if family == "gemma4_small":
        sizes["vocab_size_per_layer_input"] = sizes["vocab_size"]
    if family == "qwen3_moe":
        sizes["moe_intermediate_size"] = rng.choice([64, 128])
    layers = 6 if family in ("gemma3", "deepseek_v3", *MORE_FAMILIES) else rng.choice([2, 3, 4])
    make_checkpoint(family, folder, seed=seed, layers=layers, dtype=dtype, **sizes)
    facts = read_facts(open_checkpoint(folder))
    first, last = rng.choice([0, 0, 1]), facts.layer_count - rng.choice([0, 0, 1])
    first, last = (cut if cut in facts.legal_cuts else whole for cut, whole in ((first, 0), (last, facts.layer_count)))
    users = rng.choice([1, 2, 3, 8])
    context = rng.randint(16, max(17, TOKENS[backend] // users))
    return Edge(seed, family, dtype, Run(folder, LayerRange(first, max(last, first + 1)), context, users, bits))


def taken(backend: Backend, seeds: range, warm: list[Path], folder: Path) -> list[tuple[Edge, dict[str, int]]]:
    """The plans of these seeds, and what their stages took."""
    edges = [edge(seed, backend, folder / f"{backend}-{seed}") for seed in seeds]
    return list(zip(edges, measured(backend, warm, [each.run for each in edges]), strict=True))


def beyond(found: list[tuple[Edge, dict[str, int]]]) -> list[str]:
    """The plans whose stage took more than was promised, or far less."""
    return [
        f"{each}: {peaks['peak'] - peaks['predicted']:+} bytes beside what was promised, {peaks}"
        for each, peaks in found
        if peaks["peak"] > peaks["predicted"] + LIBRARY_BYTES or (_is_large(peaks) and share(peaks) < FLOOR)
    ]


def share(peaks: dict[str, int]) -> float:
    """Of what was promised."""
    return peaks["peak"] / peaks["predicted"]


def _is_large(peaks: dict[str, int]) -> bool:
    return peaks["predicted"] >= LARGE_BYTES


def main() -> int:
    count, failed = int(sys.argv[1]), 0
    for backend in Backend:
        shares: list[float] = []
        with tempfile.TemporaryDirectory() as scratch:
            warm = warm_ups(backend, Path(scratch) / "warm")
            for begin in range(0, count, _TOGETHER):
                seeds = range(begin, min(begin + _TOGETHER, count))
                found = taken(backend, seeds, warm, Path(scratch))
                over = beyond(found)
                failed += len(over)
                shares += [share(peaks) for _, peaks in found if _is_large(peaks)]
                least = f"; of {len(shares)} large ones the least took {min(shares):.2f}" if shares else ""
                lines = [f"{backend}, {line}" for line in over]
                lines.append(f"{backend}: {seeds.stop} of {count} plans run, {failed} beyond{least}\n")
                sys.stdout.write("\n".join(lines))
                sys.stdout.flush()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
