"""Runs stages in a process of its own and prints, for each, what memory they took beside what was predicted.

Usage: memory_peaks.py BACKEND [CHECKPOINT FIRST LAST CONTEXT USERS BITS]... (BITS 0: as it is stored)
Peaks are of resident memory, as the kernel counts it, above what was resident before the load; each phase begins anew.
Pages of libraries that are touched for the first time meanwhile are no part of a stage, and are left out.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.limits import STEP_ROWS_MAX, STEP_TOKENS_MAX
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import ModelFacts, read_facts
from cluster.placement import sequences_max, stage_cost
from cluster.steps import Boundary, Row
from cluster.types import Backend, HostTensor, LayerRange, SequenceId
from node.engine import Engine, StageSpec
from node.engines.registry import create_engine
from tests.oracle.pipelines import GREEDY


def resident_bytes(field: str) -> int:
    """`VmRSS`, its peak `VmHWM`, or what of it is of files, `RssFile`."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


def forget_peak() -> None:
    """From here on the peak counts anew. The libraries' code stays in memory meanwhile, where that is allowed: the
    kernel takes such pages away and brings them back as it likes, eight megabytes at a time were seen."""
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, *_, path = line.split(maxsplit=5)  # without a file the inode is last
        if path.startswith("/") and "r" in permissions:
            begin, end = (int(address, 16) for address in addresses.split("-"))
            libc.mlock(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin))
    Path("/proc/self/clear_refs").write_text("5")


def settle() -> None:
    """Give back what nobody uses, so that one model's leftovers are no part of the next one's base."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True, slots=True)
class Run:
    """One stage under the promise that a plan makes of it."""

    folder: Path
    layers: LayerRange
    context: int
    users: int
    bits: int | None = None  # packed in them at load


def steps(run: Run, facts: ModelFacts) -> Iterator[tuple[str, list[Row]]]:
    """The worst that a scheduler may send. All users' prompts as long as the context, in the largest steps; one token
    for each of them; then, from the beginning again, as many short sequences as there may be, all drawing, while a
    long prompt arrives."""
    context, users = run.context, run.users
    tokens = tuple(np.random.default_rng(0).integers(0, 100, size=context).tolist())
    done = [0] * users
    while min(done) < context - 1:
        rows, room = [], STEP_TOKENS_MAX
        for user in range(users):
            end = min(context - 1, done[user] + room)
            if end > done[user]:
                draw = GREEDY if end == context - 1 else None
                rows.append(Row(SequenceId(user), done[user], tokens[done[user] : end], draw))
                room -= end - done[user]
                done[user] = end
        yield "prefill", rows
    yield "batch", [Row(SequenceId(user), context - 1, (1,), GREEDY) for user in range(users)]
    yield "drop", [Row(SequenceId(user), 0, (1,), None) for user in range(users)]
    most = min(STEP_ROWS_MAX, sequences_max(facts, context, users))
    crowd = [SequenceId(1000 + each) for each in range(min(most, context * users // 8) - 1)]
    yield "crowd", [Row(seq, 0, (1, 2, 3), GREEDY) for seq in crowd]
    arriving = min(STEP_TOKENS_MAX - len(crowd), context, context * users - 4 * len(crowd))
    decoding = [Row(seq, 3, (1,), GREEDY) for seq in crowd]
    yield "crowd", [*decoding, Row(SequenceId(999), 0, tokens[:arriving], GREEDY)]


def entering(facts: ModelFacts, run: Run, rows: Sequence[Row]) -> Boundary | None:
    if run.layers.first == 0:
        return None
    tokens = sum(len(row.tokens) for row in rows)
    return tuple(
        HostTensor(spec.dtype, (tokens, *spec.shape), bytes(tokens * spec.token_bytes)) for spec in facts.boundary
    )


def peaks(backend: Backend, run: Run) -> dict[str, int]:
    facts = read_facts(open_checkpoint(run.folder), run.bits)
    cost = stage_cost(facts, run.layers, backend, context=run.context, users=run.users, on_cpu=True)
    spec = StageSpec(
        folder=run.folder,
        layers=run.layers,
        layer_count=facts.layer_count,
        boundary=facts.boundary,
        device="cpu",
        threads=1,
        kv_tokens=run.context * run.users,
        context_tokens=run.context,
        bits=facts.bits,
    )
    settle()
    forget_peak()
    before, files = resident_bytes("VmRSS"), resident_bytes("RssFile")

    def peak() -> int:
        return resident_bytes("VmHWM") - before - (resident_bytes("RssFile") - files)

    found: dict[str, int] = {}
    engine: Engine = create_engine(backend)
    engine.load(spec, lambda progress: None)
    found["load"] = peak()
    for phase, rows in steps(run, facts):
        if phase == "drop":
            for row in rows:
                engine.drop(row.seq)
            continue
        forget_peak()
        engine.step(rows, entering(facts, run, rows))
        found[phase] = max(found.get(phase, 0), peak())
    engine.close()
    return {
        **found,
        "peak": max(found.values()),
        "predicted": cost.memory_bytes,
        "weights": cost.weight_bytes,
        "kv": cost.kv_bytes,
        "workspace": cost.workspace_bytes,
    }


def measured(backend: Backend, warm: Sequence[Path], runs: Sequence[Run]) -> list[dict[str, int]]:
    """The peaks of each run, in one process for all of them. The warm-ups come first: libraries that are imported late,
    thread stacks and kernels' code are no part of a stage."""
    first = [Run(folder, LayerRange(0, _layer_count(folder)), 64, 2) for folder in warm]
    arguments = [str(part) for run in (*first, *runs) for part in (run.folder, *_numbers(run))]
    command = [sys.executable, "-m", "tests.oracle.memory_peaks", backend.value, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()[len(first) :]]


def _numbers(run: Run) -> tuple[int, ...]:
    return run.layers.first, run.layers.last, run.context, run.users, run.bits or 0


def _layer_count(folder: Path) -> int:
    return read_facts(open_checkpoint(folder)).layer_count


def main() -> None:
    backend, wanted = Backend(sys.argv[1]), sys.argv[2:]
    for at in range(0, len(wanted), 6):
        first, last, context, users, bits = map(int, wanted[at + 1 : at + 6])
        found = peaks(backend, Run(Path(wanted[at]), LayerRange(first, last), context, users, bits or None))
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
