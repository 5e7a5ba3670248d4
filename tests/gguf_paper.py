"""A tiny Llama as a GGUF file, of random numbers and without any library: for tests of files rather than of models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from tests.gguf_blocks import stored
from tests.gguf_files import Stored, write_gguf

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCABULARY = 4, 2, 8, 256, 32, 16

METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "general.name": "Paper",
    "general.license": "mit",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.key_length": HEAD_DIM,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10_000.0,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *"▁abcdefghijkl"],
    "tokenizer.ggml.scores": [0.0] * VOCABULARY,
    "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 13,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def paper_tensors(kind: str = "Q4_K", narrow: str = "Q8_0", seed: int = 0) -> dict[str, Stored]:
    """Rows of 256 values are stored as `kind`, shorter ones as `narrow`."""
    return dict(_tensors(kind, narrow, seed))


@cache
def _tensors(kind: str, narrow: str, seed: int) -> dict[str, Stored]:
    generator = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Stored:
        values = generator.normal(size=(rows, columns)).astype(np.float32)
        return stored(values, kind if columns == HIDDEN else narrow)

    def norm() -> Stored:
        return stored(generator.normal(size=HIDDEN).astype(np.float32), "F32")

    tensors = {"token_embd.weight": matrix(VOCABULARY, HIDDEN), "output_norm.weight": norm()}
    for layer in range(2):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": norm(),
            f"blk.{layer}.attn_q.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_v.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_output.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm.weight": norm(),
            f"blk.{layer}.ffn_gate.weight": matrix(INNER, HIDDEN),
            f"blk.{layer}.ffn_up.weight": matrix(INNER, HIDDEN),
            f"blk.{layer}.ffn_down.weight": matrix(HIDDEN, INNER),
        }
    return tensors


def paper_gguf(
    path: Path,
    changed: Mapping[str, object] | None = None,
    tensors: Mapping[str, Stored] | None = None,
) -> Path:
    """The whole file; a change to None removes an entry or tensor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {key: value for key, value in (METADATA | dict(changed or {})).items() if value is not None}
    return write_gguf(path, metadata, tensors if tensors is not None else paper_tensors())
