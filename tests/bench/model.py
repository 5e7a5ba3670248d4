"""The models of the table: random weights at the size that the targets name, made once into a cache folder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoints import VOCABULARY as WORN_IDS
from tests.checkpoints import make_checkpoint

VOCABULARY = 32_000
_REVISION = 1  # of what is written below; another number makes the folders anew
_SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model by what it consists of."""

    name: str
    family: str
    fields: tuple[tuple[str, int], ...] = ()
    layers: int = 24


DENSE = Shape("llama-0.36b", "llama")
EXPERTS = Shape("experts-0.36b", "qwen3_moe", (("moe_intermediate_size", 384),))
_STATES = (
    ("linear_num_key_heads", 8),
    ("linear_num_value_heads", 16),
    ("linear_key_head_dim", 64),
    ("linear_value_head_dim", 64),
    ("moe_intermediate_size", 384),
    ("shared_expert_intermediate_size", 384),
)
HYBRID = Shape("hybrid-0.2b", "qwen3_next", _STATES, layers=12)
"""Two layers of three keep a state of fixed size, so a sequence is cut back to snapshots of it."""

_WIDE_SIZES = (
    ("hidden_size", 4096),
    ("intermediate_size", 14336),
    ("num_attention_heads", 32),
    ("num_key_value_heads", 8),
    ("head_dim", 128),
)
WIDE = Shape("llama-2b-wide", "llama", _WIDE_SIZES, layers=8)
"""Layers as wide as those of a model with 8 billion parameters, for a GPU, which the others would not keep busy. Making
it takes 12 GB of memory, once."""

_TRIAL_SIZES = (
    ("hidden_size", 128),
    ("intermediate_size", 256),
    ("num_attention_heads", 4),
    ("num_key_value_heads", 2),
)
TRIAL = Shape("trial", "llama", _TRIAL_SIZES, layers=4)
"""For trying the table itself: its numbers mean nothing."""


_KINDS = {DENSE: "Dense", EXPERTS: "Mixture of experts", HYBRID: "Hybrid", WIDE: "Wide", TRIAL: "Trial"}


@dataclass(frozen=True, slots=True)
class Form:
    """A shape, and the bits in which a cluster holds its matrices."""

    shape: Shape
    bits: int | None = None  # None: bf16, as stored

    @property
    def name(self) -> str:
        """Its key in FORMS."""
        return next(name for name, form in FORMS.items() if form == self)

    @property
    def title(self) -> str:
        kind = _KINDS[self.shape]
        return f"{kind}, {'bf16' if self.bits is None else f'{self.bits} bits'}"


FORMS = {
    "dense": Form(DENSE),
    "experts": Form(EXPERTS),
    "dense4": Form(DENSE, 4),
    "experts4": Form(EXPERTS, 4),
    "hybrid": Form(HYBRID),
    "trial": Form(TRIAL),
}


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "potluck-bench"


def model_folder(shape: Shape) -> Path:
    """The shape's checkpoint; written on first use."""
    folder = cache_folder() / f"{shape.name}-r{_REVISION}"
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    fields = _SIZES | dict(shape.fields)
    make_checkpoint(shape.family, unfinished, layers=shape.layers, dtype="bfloat16", **fields)  # type: ignore[arg-type]
    _widen_vocabulary(unfinished)
    _quieten(unfinished / "model.safetensors")
    try:
        unfinished.rename(folder)
    except OSError:  # another run was faster
        shutil.rmtree(unfinished)
    return folder


def _widen_vocabulary(folder: Path) -> None:
    """The tests' tokenizer knows 384 tokens. The others become words that no merge leads to: they are never in a
    prompt, and whatever the model draws is text at once."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    vocabulary |= {f"\u0120word{number}": number for number in range(WORN_IDS, VOCABULARY)}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _quieten(file: Path) -> None:
    """Halves of characters among the answer's tokens would make events carry several or none: such ids never win."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors["lm_head.weight"][:WORN_IDS] *= 0.05
    save_file(tensors, file, {"format": "pt"})
