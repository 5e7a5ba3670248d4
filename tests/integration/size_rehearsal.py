"""A model at its real size: 8 billion parameters in bf16 over three nodes of 7 GiB each, then in 4 bits over two.

Usage, as root: python -m tests.integration.size_rehearsal. The weights are the zeros of sparse files, which cost no
disk, and as much memory and time as any others. Each node lives in a control group that would kill it beyond 7 GiB, and
whose memory the plan counts apart from the others'.
Ends with 1 when the answer was not whole, a node took more than its limit, or what it took for its stage was not what
the plan had said.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from cluster.quantities import GIB, format_bytes
from cluster.types import DType
from tests.checkpoints import write_tokenizer
from tests.integration.control_groups import limited_group
from tests.integration.live import Coordinator, joined, new_cluster, serving
from tests.oracle.memory_edges import LIBRARY_BYTES
from tests.safetensors_files import Tensors, file_of, header_of

LIMIT_BYTES = 7 * GIB
CONTEXT, PROMPT, TOKENS = 1024, 256, 4
START_S = 1800.0
"""Hashing and loading 16 GB on whatever disk and cores there are."""

FORESEEN_MIN = 0.85
"""Of the plan's bytes a process takes at least so many; beyond them, what libraries load when they first compute."""

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 32, 4096, 14336, 32, 8, 128_256
HEAD = HIDDEN // HEADS
BITS, GROUP = 4, 64


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A form of the model, and how many nodes it gets."""

    title: str
    packed: bool
    nodes: int


def main() -> int:
    if sys.platform != "linux" or os.geteuid() != 0:
        sys.stdout.write("the rehearsal needs Linux and root, for control groups\n")
        return 2
    rehearsals = (Rehearsal("bf16", packed=False, nodes=3), Rehearsal("4 bits", packed=True, nodes=2))
    return max([rehearse(rehearsal) for rehearsal in rehearsals])


def rehearse(rehearsal: Rehearsal) -> int:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="potluck-rehearsal-")))
        model = write_model(folder / "model", packed=rehearsal.packed)
        cluster, pids, idle_bytes = new_cluster(), {}, {}
        peers: list[str] = []
        began_s = time.monotonic()
        for number in range(rehearsal.nodes):
            name = f"node-{number}"
            procs = _group(stack) / "cgroup.procs"
            prefix = ("sh", "-c", f"echo $$ > '{procs}' && exec \"$@\"", "sh")
            options = {"memory": f"{LIMIT_BYTES // GIB}GiB", "prefix": prefix}
            node = stack.enter_context(joined(name, "torch", cluster, folder / name, "--no-mdns", **options))  # type: ignore[arg-type]
            peers += ["--peer", str(node.wait_for("up", 120.0)["addresses"][0])]
            pids[name], idle_bytes[name] = node.pid, _status_bytes(node.pid, "VmRSS")
        wanted = ["--no-local-node", "--no-mdns", "--min-nodes", str(rehearsal.nodes), *peers]
        limits = {"context": CONTEXT, "users": 1}
        coordinator = stack.enter_context(serving(model, cluster, folder / "coordinator", *wanted, **limits))  # type: ignore[arg-type]
        _wait_ready(coordinator, began_s)
        ready_s = time.monotonic() - began_s
        began_s = time.monotonic()
        answer = coordinator.complete([5] * PROMPT, max_tokens=TOKENS)
        sys.stdout.write(
            f"{rehearsal.title} on {rehearsal.nodes} nodes: ready after {ready_s:.0f} s; {PROMPT} tokens in and "
            f"{len(answer['token_ids'])} out took {time.monotonic() - began_s:.1f} s\n"
        )
        whole = len(answer["token_ids"]) == TOKENS
        stages = coordinator.status()["plan"]["stages"]
        within = [_show(stage, pids[stage["node"]], idle_bytes[stage["node"]]) for stage in stages]
        return 0 if whole and all(within) else 1


def _group(stack: contextlib.ExitStack) -> Path:
    try:
        return stack.enter_context(limited_group(LIMIT_BYTES))
    except OSError as error:
        raise SystemExit(f"no control group can be made ({error}); is its controller on?") from error


def _wait_ready(coordinator: Coordinator, began_s: float) -> None:
    """Until it serves, saying what it does meanwhile; at once an error where the nodes are too small."""
    phase = ""
    while coordinator.get("/ready").status_code != 200:
        health = coordinator.get("/health").json()
        if "are missing in all" in health["reason"]:
            raise SystemExit(health["reason"])
        if time.monotonic() - began_s > START_S:
            raise SystemExit(f"not ready within {START_S:.0f} s: {health['phase']}: {health['reason']}")
        if health["phase"] != phase:
            phase = health["phase"]
            sys.stdout.write(f"{time.monotonic() - began_s:4.0f} s: {phase}\n")
            sys.stdout.flush()
        time.sleep(1.0)


def _show(stage: dict[str, Any], pid: int, idle_bytes: int) -> bool:
    """One stage's plan beside what its process really took; whether it kept to its limit and the plan foresaw it.
    `idle_bytes` is what the process took with its engine imported and no stage."""
    planned = stage["weight_bytes"] + stage["kv_bytes"] + stage["workspace_bytes"]
    peak = _status_bytes(pid, "VmHWM")
    taken = peak - idle_bytes
    layers = f"layers {stage['first_layer']}-{stage['last_layer'] - 1}"
    sys.stdout.write(
        f"  {stage['node']} {layers}: plan {format_bytes(planned)}, taken {format_bytes(taken)} "
        f"({taken / planned:.2f}); process peak {format_bytes(peak)} of {format_bytes(LIMIT_BYTES)}\n"
    )
    sys.stdout.flush()
    return peak <= LIMIT_BYTES and FORESEEN_MIN * planned <= taken <= planned + LIBRARY_BYTES


def _status_bytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def write_model(folder: Path, *, packed: bool) -> Path:
    """A folder like any other, whose weights take no room on the disk."""
    folder.mkdir()
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "max_position_embeddings": 8192, "tie_word_embeddings": False, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if packed:
        config["quantization"] = {"bits": BITS, "group_size": GROUP}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    tensors = dict(_tensors(packed=packed))
    header = file_of(header_of(tensors), 0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + _data_bytes(tensors))
    return folder


def _data_bytes(tensors: Tensors) -> int:
    return sum(prod(shape) * dtype.size_bytes for dtype, shape in tensors.values())


def _tensors(*, packed: bool) -> Iterator[tuple[str, tuple[DType, tuple[int, ...]]]]:
    def matrix(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[DType, tuple[int, ...]]]]:
        if not packed:
            yield f"{name}.weight", (DType.BF16, (rows, columns))
            return
        yield f"{name}.weight", (DType.U32, (rows, columns * BITS // 32))
        for part in ("scales", "biases"):
            yield f"{name}.{part}", (DType.BF16, (rows, columns // GROUP))

    yield from matrix("model.embed_tokens", VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", KV_HEADS * HEAD, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * HEAD, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ):
            yield from matrix(f"{prefix}.{name}", rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (DType.BF16, (HIDDEN,))
    yield "model.norm.weight", (DType.BF16, (HIDDEN,))
    yield from matrix("lm_head", VOCABULARY, HIDDEN)


if __name__ == "__main__":
    sys.exit(main())
