"""The table's models as llama.cpp reads them: the same bf16 numbers, renamed and, for Llama, with rotated rows put in
its order. Four bits are its own quantiser's Q4_0 of that file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.model import Form, model_folder
from tests.bench.peers.build import QUANTISER, program
from tests.gguf_files import Stored, write_gguf
from tests.gguf_models import metadata, sources_by_name, tokenizer_metadata

_QUANTISE_S = 600.0


def gguf_file(form: Form) -> Path:
    """The form as a GGUF file beside its checkpoint; written on first use."""
    folder = model_folder(form.shape)
    plain = folder.with_name(f"{folder.name}.bf16.gguf")
    if not plain.exists():
        _write(folder, plain)
    if form.bits is None:
        return plain
    packed = folder.with_name(f"{folder.name}.q4_0.gguf")
    if not packed.exists():
        unfinished = packed.with_suffix(".unfinished")
        command = [str(program(QUANTISER)), str(plain), str(unfinished), "Q4_0"]
        subprocess.run(command, check=True, capture_output=True, timeout=_QUANTISE_S)
        unfinished.rename(packed)
    return packed


def _write(folder: Path, path: Path) -> None:
    from safetensors import safe_open

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Stored] = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name, sources in sources_by_name(file.keys(), config).items():
            values = [_ordered(file.get_tensor(source), name, config) for source in sources]
            tensors[name] = _stored(values, name)
    described = {**metadata(config), **tokenizer_metadata(folder), "general.file_type": 32}
    unfinished = path.with_suffix(".unfinished")
    write_gguf(unfinished, described, tensors)
    unfinished.rename(path)


def _stored(values: list[Any], name: str) -> Stored:
    """Matrices as they are; norms and routers in float32, as converters write them."""
    import torch

    whole = torch.stack(values) if len(values) > 1 else values[0]
    if whole.ndim == 1 or "ffn_gate_inp" in name:
        return "F32", tuple(whole.shape), whole.float().numpy().tobytes()
    return "BF16", tuple(whole.shape), whole.contiguous().view(torch.uint16).numpy().astype(np.uint16).tobytes()


def _ordered(values: Any, name: str, config: Mapping[str, Any]) -> Any:
    """llama.cpp rotates neighbours where transformers rotates halves: rows of queries and keys move."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    inner = name.split(".")[-2]
    if config["model_type"] != "llama" or inner not in heads:
        return values
    split = values.reshape(heads[inner], 2, -1, *values.shape[1:])
    return split.transpose(1, 2).contiguous().reshape(values.shape)
