"""Target 9: what a GPU makes of the same model, beside what its memory and its matrix units allow.

Runs only where CUDA is. Nodes are those of the other arms, on the first card; the model has layers as wide as those of
models that people put on one. What a token must read (weights but no embedding, and its past) and what a prompt must
multiply (layers; the head only once) come from the model's facts.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.cli.bench_measures import Load
from cluster.errors import ClusterError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import read_facts
from tests.bench.arms import Place, cluster_arm
from tests.bench.bench import ONE, TWO, Bench
from tests.bench.loads import IN_TOKENS, first_s, interleaved, run_load, token_s, tokens_s
from tests.bench.model import TRIAL, WIDE, Form, model_folder
from tests.bench.rows import Row, at_least, at_most, unmeasured
from tests.bench.targets.first_token import PROMPT

DEVICE = "cuda:0"
USERS = 16
MEMORY = "12GiB"
_COPY_BYTES, _MATRIX, _REPEATS = 4 << 30, 8192, 20
_CHILD_S = 900.0


def rows(bench: Bench) -> list[Row]:
    import torch

    if not torch.cuda.is_available():
        return [unmeasured(9, "one node, two nodes and sixteen users on a GPU", "no GPU here")]
    form = bench.form if bench.form.shape is TRIAL else Form(WIDE)
    facts = read_facts(open_checkpoint(model_folder(form.shape)))
    card = _in_child("card")
    whole = _in_child("whole", str(model_folder(form.shape)))
    with contextlib.ExitStack() as stack:
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potluck-bench-")))
        arms = [
            stack.enter_context(cluster_arm(name, form, [Place()] * nodes, state, device=DEVICE, memory=MEMORY))
            for name, nodes in ((ONE, 1), (TWO, 2))
        ]
        output, rounds = bench.effort.output_tokens, bench.effort.rounds
        alone = run_load(arms, Load(1, IN_TOKENS, output, rounds=1), rounds)
        many = run_load(arms[:1], Load(USERS, IN_TOKENS, output, rounds=1), rounds)
        answers = interleaved(arms[:1], rounds, lambda arm: arm.endpoint.ask(arm.endpoint.prompt(PROMPT), 1))
    layer_bytes = sum(layer.streamed_bytes for layer in facts.layers)
    past_bytes = sum(layer.kv_bytes_per_token for layer in facts.layers) * (IN_TOKENS + output // 2)
    read_bytes = layer_bytes + facts.norm_bytes + facts.head_bytes + past_bytes
    one_s, two_s = token_s(alone[ONE]), token_s(alone[TWO])
    prompt_s = first_s(answers[ONE])
    operations = 2 * layer_bytes / 2 * PROMPT  # a multiplication and an addition for each two-byte weight and token
    return [
        Row(9, "one node, one user: share of what memory bandwidth allows", read_bytes / card["bytes_s"] / one_s, "",
            1.0, at_least(0.8)),
        Row(9, f"one node, {PROMPT} tokens: share of the card's matrix rate", operations / prompt_s / card["flop_s"],
            "", 1.0, at_least(0.5)),
        Row(9, "two nodes on one card: time per token, to one node", two_s / one_s, "", 1.0, at_most(1.1)),
        Row(9, f"one node, {USERS} users: tokens a second, to one user", tokens_s(many[ONE]) / tokens_s(alone[ONE]), "",
            float(USERS), at_least(8.0)),
        Row(9, "one node, one user: time per token", 1000 * one_s, "ms", 1000 * read_bytes / card["bytes_s"]),
        Row(9, "the whole model under torch.compile: time per token", 1000 * whole["token_s"], "ms"),
        Row(9, "the card: memory", card["bytes_s"] / 1e9, "GB/s", note=card["name"]),
        Row(9, "the card: bf16 products", card["flop_s"] / 1e12, "TFLOP/s"),
    ]  # fmt: skip


def _in_child(*arguments: str) -> Mapping[str, Any]:
    """In a process of its own, so that what it takes of the card is free again."""
    command = [sys.executable, "-m", "tests.bench.targets.gpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_S, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{arguments[0]} on {DEVICE}: {done.stderr[-500:]}")
    found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- The child -------------------------------------------------------------------------------------------


def _card() -> Mapping[str, object]:
    """Bytes that a copy moves and operations that a product does, in a second."""
    import torch

    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy_s = _seconds(lambda: target.copy_(source))
    left = torch.randn(_MATRIX, _MATRIX, dtype=torch.bfloat16, device=DEVICE)
    product_s = _seconds(lambda: left @ left)
    name = torch.cuda.get_device_name(DEVICE)
    return {"bytes_s": 2 * _COPY_BYTES / copy_s, "flop_s": 2 * _MATRIX**3 / product_s, "name": name}


def _seconds(work: Callable[[], object]) -> float:
    import torch

    work()
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(_REPEATS):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began_s) / _REPEATS


def _whole(folder: str) -> Mapping[str, object]:
    """The library's own model in one piece, whose decode steps it compiles: what a token costs without us."""
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).eval()
    config = CompileConfig(mode="reduce-overhead", fullgraph=True)
    prompt = torch.randint(1000, 30_000, (1, IN_TOKENS), device=DEVICE)

    def generate(tokens: int) -> float:
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        fixed = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        model.generate(prompt, cache_implementation="static", compile_config=config, **fixed)
        torch.cuda.synchronize()
        return time.perf_counter() - began_s

    generate(16), generate(128)  # compiles
    if not hasattr(model, "_compiled_call"):
        raise SystemExit("transformers has not compiled the model: what it took would not say what it is meant to say")
    short_s, long_s = generate(16), generate(128)
    return {"token_s": (long_s - short_s) / (128 - 16)}


def main(what: str, *arguments: str) -> None:
    found = _card() if what == "card" else _whole(*arguments)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
