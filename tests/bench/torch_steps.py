"""Times the torch engine's steps on one pinned core: one row, sixteen rows, a prefill of 512 tokens.

Usage: python -m tests.bench.torch_steps [--core N] [--folder CHECKPOINT] [--bits N] [--repeat N] [--floor] [--stock]
       [--profile LOAD]
The model is a Llama shape of 0.36 billion random bf16 parameters, written to FOLDER unless it is there. Prints medians
of wall and of process time for each step, in milliseconds. `--floor` adds what this core cannot go below: the time to
read the weights once, and the prefill's products at the rate of one large product. `--stock` adds `transformers` with
its own cache. To compare two versions of the code, run both in turns: other processes share the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from node.engines.torch.engine import TorchEngine
from tests.checkpoints import make_checkpoint
from tests.oracle.pipelines import row, stage_specs

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
}
LAYERS, CONTEXT, CROWD, PROMPT = 24, 1024, 16, 512

Load = Callable[[], object]


def milliseconds(call: Load, times: int) -> tuple[float, float]:
    """Medians of wall and of process time."""
    walls, processes = [], []
    for _ in range(times):
        wall, process = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        processes.append(time.process_time() - process)
    return 1e3 * statistics.median(walls), 1e3 * statistics.median(processes)


def engine_loads(engine: TorchEngine) -> Iterator[tuple[str, Load, int]]:
    """Name, one step, and how often to time it. Decode steps are at contexts from 100 on."""
    lengths = dict.fromkeys(range(CROWD), 100)
    first, *others = (row(seq, 0, range(1000, 1100), draw=False) for seq in lengths)
    engine.step([first], None)
    for other in others:
        engine.fork(first.seq, other.seq, 100)

    def decode(rows: int) -> None:
        engine.step([row(seq, lengths[seq], (1000 + seq,)) for seq in range(rows)], None)
        for seq in range(rows):
            lengths[seq] += 1

    def prefill() -> None:
        engine.step([row(CROWD, 0, range(2000, 2000 + PROMPT))], None)
        engine.drop(row(CROWD, 0, (1,)).seq)

    yield "1 row", lambda: decode(1), 64
    yield f"{CROWD} rows", lambda: decode(CROWD), 64
    yield f"prefill {PROMPT}", prefill, 5


def stock_loads(folder: Path) -> Iterator[tuple[str, Load, int]]:
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for rows in (1, CROWD):
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.arange(1000, 1100).repeat(rows, 1), past_key_values=cache)
        token = torch.full((rows, 1), 1000)
        yield f"{rows} rows, stock", partial(model, input_ids=token, past_key_values=cache), 32
    prompt = torch.arange(2000, 2000 + PROMPT)[None]
    yield f"prefill {PROMPT}, stock", lambda: model(input_ids=prompt, logits_to_keep=1), 5


def floors() -> Iterator[tuple[str, float]]:
    """Milliseconds for the weights' bytes at this core's rate of reading, and for a prefill's products at the rate of
    one product with its weights packed."""
    hidden, inner, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], 2 * SHAPE["num_key_value_heads"] * 64
    layers = LAYERS * (hidden * (2 * hidden + kv) + 3 * hidden * inner)
    head = hidden * SHAPE["vocab_size"]
    read = torch.ones(1 << 26, dtype=torch.float32)
    wall, _ = milliseconds(lambda: torch.dot(read, read), 9)
    yield "read the weights", wall * 2 * (layers + head) / read.nbytes
    weight, x = torch.randn(inner, hidden).bfloat16(), torch.randn(PROMPT, hidden).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PROMPT)
    wall, _ = milliseconds(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), 30)
    yield f"products of {PROMPT} tokens", wall * layers / weight.numel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "potluck-bench-llama")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--floor", action="store_true")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--profile", help="a load, by the first letters of its name")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})
    torch.set_num_threads(1)
    if not (arguments.folder / "config.json").exists():
        make_checkpoint("llama", arguments.folder, layers=LAYERS, dtype="bfloat16", **SHAPE)
    with torch.inference_mode():
        for name, wall in floors() if arguments.floor else ():
            sys.stdout.write(f"{name:>20}: {wall:8.2f} ms, floor\n")
        engine = TorchEngine()
        spec = stage_specs(arguments.folder, (), kv_tokens=32 * CONTEXT, context_tokens=CONTEXT, bits=arguments.bits)[0]
        began = time.perf_counter()
        engine.load(spec, lambda progress: None)
        sys.stdout.write(f"{'load':>20}: {time.perf_counter() - began:8.2f} s\n")
        for name, load, times in engine_loads(engine):
            load()
            if arguments.profile and name.startswith(arguments.profile):
                with torch.profiler.profile() as profiler:
                    for _ in range(5):
                        load()
                sys.stdout.write(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40) + "\n")
            for _ in range(arguments.repeat):
                wall, process = milliseconds(load, times)
                sys.stdout.write(f"{name:>20}: {wall:8.2f} ms, {process:8.2f} ms of processor time\n")
        engine.close()
        for name, load, times in stock_loads(arguments.folder) if arguments.stock else ():
            load()
            wall, process = milliseconds(load, times)
            sys.stdout.write(f"{name:>20}: {wall:8.2f} ms, {process:8.2f} ms of processor time\n")


if __name__ == "__main__":
    main()
