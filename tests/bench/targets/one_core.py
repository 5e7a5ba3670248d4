"""Target 10: what one core makes of one user's token, beside what reading the weights costs."""

from __future__ import annotations

from cluster.models.checkpoint import open_checkpoint
from tests.bench.bench import LLAMA_ONE, ONE, Bench
from tests.bench.loads import token_s
from tests.bench.model import model_folder
from tests.bench.read_rate import read_bytes_s
from tests.bench.rows import NO_PEERS, Row, at_most, unmeasured
from tests.bench.targets.one_user import ARMS

_LOOKED_UP = "embed_tokens.weight"
"""Of which a token needs one row."""


def rows(bench: Bench) -> list[Row]:
    (engine_s,) = bench.passes(ONE, bench.shot(1))
    tensors = open_checkpoint(model_folder(bench.form.shape)).tensors
    read_bytes = sum(tensor.size_bytes for name, tensor in tensors.items() if not name.endswith(_LOOKED_UP))
    best_s = read_bytes / read_bytes_s()
    found = [
        Row(10, "the engine alone on one core: time per token", 1000 * engine_s, "ms", 1000 * best_s,
            note="the ceiling reads all matrices once, at the rate of a plain read"),
    ]  # fmt: skip
    if not bench.has(LLAMA_ONE):
        found.append(unmeasured(10, "the engine alone on one core, to llama.cpp on one core", NO_PEERS))
    else:
        llama_s = token_s(bench.load(1, *ARMS)[LLAMA_ONE])
        found += [
            Row(10, "the engine alone on one core, to llama.cpp on one core", engine_s / llama_s, "", None,
                at_most(1.25)),
            Row(10, "llama.cpp on one core: time per token", 1000 * llama_s, "ms"),
        ]  # fmt: skip
    return found
