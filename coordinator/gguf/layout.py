"""What a GGUF model becomes: a configuration, and tensors with names, types and places in files that do not exist yet.

Owns: which tensor of the model is stored how. The plan alone is enough to tell what serving would cost, and writing
it out is `coordinator.gguf.convert`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from cluster.errors import ModelError
from cluster.models.checkpoint import Checkpoint, StoredTensor
from cluster.models.gguf_header import GgufTensor
from cluster.models.gguf_types import GgmlType
from cluster.models.safetensors_header import LENGTH_BYTES
from cluster.quantities import GIB
from cluster.types import DType
from coordinator.gguf.architectures import COMPUTED, Architecture, architecture_of
from coordinator.gguf.blocks import CODE_BITS, GROUP
from coordinator.gguf.source import GgufFiles
from coordinator.gguf.tokenizer import special_ids

SHARD_BYTES: Final = 2 * GIB
"""About how large a file becomes: whole ones survive a kill, and several are hashed at once."""

_EMBEDDING = "token_embd.weight"
_NAME = re.compile(r"(?:(?P<end>\w+)|blk\.(?P<layer>0|[1-9]\d{0,3})\.(?P<inner>\w+))\.(?P<kind>weight|bias)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the model, and the tensors that it becomes."""

    path: Path
    source: GgufTensor
    name: str  # without .weight and .bias
    targets: tuple[StoredTensor, ...]  # codes, scales and biases; or numbers
    heads: int  # whose rows are in the order of rotations that pair neighbours; 0: in no such order
    subtracts_one: bool

    @property
    def packing(self) -> str | None:
        """In MLX's words; None where numbers are stored as such."""
        if self.source.type is GgmlType.MXFP4:
            return "mxfp4"
        return "affine" if self.source.type in CODE_BITS else None


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the result."""

    name: str
    header: bytes
    size_bytes: int
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole result."""

    files: GgufFiles
    architecture: Architecture
    config: Mapping[str, object]
    dtype: DType
    shards: tuple[Shard, ...]

    @property
    def steps(self) -> Iterable[Step]:
        return (step for shard in self.shards for step in shard.steps)

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)

    def checkpoint(self) -> Checkpoint:
        """The result as if it were written already."""
        tensors = {target.name: target for step in self.steps for target in step.targets}
        return Checkpoint(self.files.paths[0], self.config, tensors)

    def notes(self) -> tuple[str, ...]:
        """What happens to each kind of tensor, for people."""
        kinds: dict[GgmlType, Step] = {}
        for step in self.steps:
            kinds.setdefault(step.source.type, step)
        return tuple(
            _note(kind, step, self.dtype) for kind, step in sorted(kinds.items(), key=lambda item: item[0].name)
        )


def lay_out(files: GgufFiles, *, dtype: DType | None = None, shard_bytes: int = SHARD_BYTES) -> Layout:
    """Plan the conversion of `files`; ModelError names what is not converted. Without `dtype` the model's is taken."""
    architecture = architecture_of(files)
    config = architecture.configure(files)
    files.facts.refuse_unread(f"{architecture.name}.")
    chosen = dtype or _dtype(files, architecture)
    config |= special_ids(files.facts)
    config |= {"torch_dtype": _TORCH_NAMES[chosen], "vocab_size": _vocabulary_size(files)}
    steps = [_step(path, tensor, architecture, files, chosen) for path, tensor in _in_order(files)]
    names = Counter(target.name for step in steps for target in step.targets)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ModelError(f"{files.facts.where}: two of its tensors would become {twice[0]}; convert the model again")
    config |= _quantization(steps)
    return Layout(files, architecture, config, chosen, tuple(_shards(steps, shard_bytes)))


_TORCH_NAMES = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}


def _dtype(files: GgufFiles, architecture: Architecture) -> DType:
    """What the model computes in. Packed models take what their family bears; others the type of their matrices."""
    kinds = {tensor.type for _, tensor in files.tensors.values() if len(tensor.shape) > 1}
    if kinds <= {GgmlType.F32}:
        return DType.F32
    if GgmlType.BF16 in kinds and not any(kind.is_packed for kind in kinds):
        return DType.BF16
    return architecture.dtype


def _vocabulary_size(files: GgufFiles) -> int:
    """Rows of the embedding. Some have more than there are tokens, which nothing ever asks for."""
    where, tokens = files.facts.where, len(files.facts.texts("tokenizer.ggml.tokens"))
    if _EMBEDDING not in files.tensors:
        raise ModelError(f"{where}: expected the tensor {_EMBEDDING}, found none; download the model again")
    rows = files.tensors[_EMBEDDING][1].shape[0]
    if tokens > rows:
        raise ModelError(f"{where}: has {tokens} tokens, but an embedding of {rows}; download the model again")
    return rows


def _in_order(files: GgufFiles) -> list[tuple[Path, GgufTensor]]:
    """As they lie in the files, so that each is read from its beginning to its end."""
    found = [(path, tensor) for name, (path, tensor) in files.tensors.items() if name not in COMPUTED]
    return sorted(found, key=lambda item: (files.paths.index(item[0]), item[1].begin))


def _step(path: Path, source: GgufTensor, architecture: Architecture, files: GgufFiles, dtype: DType) -> Step:
    match = _NAME.fullmatch(source.name)
    inner = (match["end"] or match["inner"]) if match else ""
    known = architecture.ends if match and match["end"] else architecture.layer
    if match is None or inner not in known:
        raise ModelError(
            f"{path}: the tensor {source.name!r:.80} is none of {architecture.title}'s; "
            "use a version of this model in safetensors"
        )
    name = known[inner] if match["end"] else f"model.layers.{match['layer']}.{known[inner]}"
    heads = architecture.heads(files, inner)
    if heads and source.shape[0] % (2 * heads):
        raise ModelError(
            f"{path}: {source.name} has {source.shape[0]} rows, which are no {heads} heads; download again"
        )
    if source.type.is_packed and (len(source.shape) == 1 or match["kind"] == "bias"):
        raise ModelError(
            f"{path}: {source.name} is no matrix, but stored as {source.type.name}; convert the model again"
        )
    subtracts_one = architecture.adds_one and inner.endswith("norm")
    full_name = name if inner in architecture.bare else f"{name}.{match['kind']}"
    targets = _targets(source, name, full_name, dtype)
    return Step(path, source, name, targets, heads, subtracts_one)


def _targets(source: GgufTensor, name: str, full_name: str, dtype: DType) -> tuple[StoredTensor, ...]:
    """Places are given later."""
    *rows, columns = source.shape
    if source.type is GgmlType.MXFP4:
        return (
            StoredTensor(f"{name}.weight", DType.U32, (*rows, columns // 8), "", 0, 0),
            StoredTensor(f"{name}.scales", DType.U8, (*rows, columns // GROUP), "", 0, 0),
        )
    bits = CODE_BITS.get(source.type)
    if bits is None:
        return (StoredTensor(full_name, dtype, source.shape, "", 0, 0),)
    words, groups = (*rows, columns * bits // 32), (*rows, columns // GROUP)
    return (
        StoredTensor(f"{name}.weight", DType.U32, words, "", 0, 0),
        StoredTensor(f"{name}.scales", dtype, groups, "", 0, 0),
        StoredTensor(f"{name}.biases", dtype, groups, "", 0, 0),
    )


def _quantization(steps: Iterable[Step]) -> dict[str, object]:
    """How most matrices are packed for all, and of each other one by name."""
    packed = {step.name: (CODE_BITS.get(step.source.type, 4), step.packing) for step in steps if step.packing}
    if not packed:
        return {}
    usual = max(sorted(set(packed.values())), key=list(packed.values()).count)

    def stated(how: tuple[int, str]) -> dict[str, object]:
        return {"group_size": GROUP, "bits": how[0], "mode": how[1]}

    return {"quantization": stated(usual) | {name: stated(own) for name, own in packed.items() if own != usual}}


def _shards(steps: list[Step], shard_bytes: int) -> Iterable[Shard]:
    groups: list[list[Step]] = [[]]
    taken = 0
    for step in steps:
        size = sum(_size(target) for target in step.targets)
        if groups[-1] and taken + size > shard_bytes:
            groups.append([])
            taken = 0
        groups[-1].append(step)
        taken += size
    for number, group in enumerate(groups, 1):
        yield _shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group)


def _shard(name: str, steps: list[Step]) -> Shard:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for step in steps:
        for target in step.targets:
            begin, end = end, end + _size(target)
            fields[target.name] = {
                "dtype": target.dtype.value,
                "shape": list(target.shape),
                "data_offsets": [begin, end],
            }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % 8)  # so that tensors are aligned in memory
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    placed, at = [], len(header)
    for step in steps:
        targets = []
        for target in step.targets:
            size = _size(target)
            targets.append(StoredTensor(target.name, target.dtype, target.shape, name, at, at + size))
            at += size
        placed.append(Step(step.path, step.source, step.name, tuple(targets), step.heads, step.subtracts_one))
    return Shard(name, header, at, tuple(placed))


def _size(target: StoredTensor) -> int:
    return prod(target.shape) * target.dtype.size_bytes


def _note(kind: GgmlType, step: Step, dtype: DType) -> str:
    if kind in CODE_BITS:
        return (
            f"{kind.name}: codes kept, {CODE_BITS[kind]} bits in groups of {GROUP}; scales and biases as {dtype.value}"
        )
    if kind is GgmlType.MXFP4:
        return "MXFP4: as it is, in another order"
    if kind is GgmlType.Q6_K:
        return f"Q6_K: scales go with 16 values, which neither engine computes with; unpacked to {dtype.value}"
    if kind.name == dtype.value:
        return f"{kind.name}: as it is"
    return f"{kind.name}: rounded to {dtype.value}"
