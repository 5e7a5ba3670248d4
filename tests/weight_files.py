"""A model folder of random bytes, written by hand: real names, real headers, several files; nothing computes it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from cluster.types import DType
from tests.safetensors_files import file_of, header_of


def write_model(folder: Path, *, layers: int = 6, tensor_bytes: int = 64, shards: int = 2, seed: int = 0) -> Path:
    """Each layer has two tensors of `tensor_bytes`; so have the embedding and the head. The norm is small."""
    chance = random.Random(seed)
    shape = (tensor_bytes // 4,)
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("mlp", "self_attn")]
    names += ["model.norm.weight", "lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    per_shard = -(-len(names) // shards)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        mine = names[shard * per_shard : (shard + 1) * per_shard]
        header = header_of({name: (DType.F32, (4,) if name == "model.norm.weight" else shape) for name in mine})
        empty = file_of(header, 0)
        data_bytes = sum(16 if name == "model.norm.weight" else tensor_bytes for name in mine)
        (folder / file).write_bytes(empty + chance.randbytes(data_bytes))
        weight_map |= dict.fromkeys(mine, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps({"seed": seed}))
    (folder / "README.md").write_text("not part of the model")
    return folder
