"""Writes the folder that a GGUF model becomes, some rows of a tensor at a time.

Owns: order, rounding and the disk. A file of the result is whole or absent, and the folder gets its name last: what a
kill interrupts goes on behind the last whole file. What is written where is `coordinator.gguf.layout`'s business.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.errors import ModelError
from cluster.models.checkpoint import CONFIG_FILE, INDEX_FILE, StoredTensor
from cluster.models.hashing import Advance, CountProgress, counting
from cluster.quantities import MIB, format_bytes
from cluster.types import DType
from coordinator.gguf.blocks import CODE_BITS, Bytes, Floats, affine, four_bit_floats, numbers, packed
from coordinator.gguf.layout import Layout, Shard, Step
from coordinator.gguf.source import read_bytes

_CHUNK_VALUES: Final = 4 * MIB
"""Values of a tensor in memory at once; in float32 and some copies of it about 100 MiB."""

MARGIN_BYTES: Final = 64 * MIB
"""Left free on the disk, for whoever else writes there."""

SmallFiles = Mapping[str, bytes]
"""Tokenizer and settings, by file name."""


def convert(
    layout: Layout,
    small: SmallFiles,
    folder: Path,
    progress: CountProgress | None = None,
    cancelled: threading.Event | None = None,
) -> None:
    """Write the model to `folder`, which does not exist yet. What an earlier try left of the same model is used."""
    unfinished = folder.with_name(f"{folder.name}.part")
    stop = cancelled or threading.Event()
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        missing = [shard for shard in layout.shards if not _is_whole(unfinished / shard.name, shard)]
        _check_room(unfinished, sum(shard.size_bytes for shard in missing))
        advance = counting(layout.size_bytes, progress)
        advance(layout.size_bytes - sum(shard.size_bytes for shard in missing))
        for shard in missing:
            _write_shard(unfinished / shard.name, shard, advance, stop)
        for name, data in {**small, **_settings(layout)}.items():
            _write_whole(unfinished / name, lambda file, data=data: file.write(data))
        os.replace(unfinished, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"the disk of {unfinished} is full. What is converted is kept: free some space and start again, "
                "or use --state on a larger disk"
            ) from error
        raise ModelError(f"cannot write the converted model to {unfinished}: {error.strerror or error}") from error


def _is_whole(path: Path, shard: Shard) -> bool:
    """Whether an earlier try wrote this file: only whole ones have its name, and the header tells of other plans."""
    try:
        if path.stat().st_size != shard.size_bytes:
            return False
        with path.open("rb") as file:
            return file.read(len(shard.header)) == shard.header
    except FileNotFoundError:
        return False


def _check_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes and needed_bytes + MARGIN_BYTES > free_bytes:
        raise ModelError(
            f"the converted model needs {format_bytes(needed_bytes)} on the disk of {folder}, which has "
            f"{format_bytes(free_bytes)} free. Free some space there, or use --state on a larger disk"
        )


def _settings(layout: Layout) -> SmallFiles:
    weight_map = {target.name: target.file for step in layout.steps for target in step.targets}
    index = {"metadata": {"total_size": layout.size_bytes}, "weight_map": weight_map}
    return {INDEX_FILE: json.dumps(index).encode(), CONFIG_FILE: json.dumps(layout.config, indent=1).encode()}


def _write_whole(path: Path, write: Callable[..., object]) -> None:
    """A file gets its name once all of it is on the disk."""
    begun = path.with_name(f".{path.name}.begun")
    with begun.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(begun, path)


def _write_shard(path: Path, shard: Shard, advance: Advance, stop: threading.Event) -> None:
    def write(file: npt.ArrayLike) -> None:
        descriptor = file.fileno()  # type: ignore[union-attr]
        _write_at(descriptor, shard.header, 0)
        advance(len(shard.header))
        for step in shard.steps:
            done = [target.begin for target in step.targets]
            for pieces in _converted(step):
                if stop.is_set():
                    raise ModelError("the conversion was cancelled; it goes on from here the next time")
                for number, piece in enumerate(pieces):
                    _write_at(descriptor, piece, done[number])
                    done[number] += len(piece)
                advance(sum(map(len, pieces)))
            assert done == [target.end for target in step.targets], f"{step.name} was laid out for another size"

    _write_whole(path, write)


def _write_at(descriptor: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def _converted(step: Step) -> Iterator[tuple[bytes, ...]]:
    """The bytes of each target, some rows at a time."""
    source = step.source
    # A vector's values are rows of one, so that those of a bias can be put in order like the rows of its matrix.
    columns = source.shape[-1] if len(source.shape) > 1 else 1
    rows = (source.end - source.begin) // (row_bytes := columns // source.type.block_values * source.type.block_bytes)
    together = source.shape[0] // step.heads if step.heads else 1
    count = max(1, _CHUNK_VALUES // (columns * together)) * together
    for first in range(0, rows, count):
        last = min(rows, first + count)
        begin = source.begin + first * row_bytes
        data = np.frombuffer(read_bytes(step.path, begin, begin + (last - first) * row_bytes), np.uint8)
        chunk: Bytes = data.reshape(last - first, row_bytes)
        if step.heads:
            chunk = halves_apart(chunk, together)
        yield _targets(step, chunk)


def halves_apart(rows: Bytes, head_rows: int) -> Bytes:
    """Rows of whole heads in the order of transformers, whose rotation pairs the first half of a head with the second.
    In GGUF each pair is neighbours, because its rotation pairs neighbours."""
    heads = rows.reshape(-1, head_rows // 2, 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def _targets(step: Step, rows: Bytes) -> tuple[bytes, ...]:
    first = step.targets[0]
    if step.packing == "mxfp4":
        words, exponents = four_bit_floats(rows)
        return words.tobytes(), exponents.tobytes()
    if step.packing is None:
        values = numbers(step.source.type, rows)
        return (_rounded(values - np.float32(1) if step.subtracts_one else values, first, step),)
    parts = affine(step.source.type, rows)
    _, scales, biases = step.targets
    codes = packed(parts.codes, CODE_BITS[step.source.type]).tobytes()
    return codes, _rounded(parts.scales, scales, step), _rounded(parts.biases, biases, step)


def _rounded(values: Floats, target: StoredTensor, step: Step) -> bytes:
    """Each value rounded once, to the nearest of the target's type."""
    with np.errstate(over="ignore", invalid="ignore"):
        match target.dtype:
            case DType.F32:
                found, is_finite = values.astype("<f4").tobytes(), bool(np.isfinite(values).all())
            case DType.F16:
                half = values.astype("<f2")
                found, is_finite = half.tobytes(), bool(np.isfinite(half).all())
            case DType.BF16:
                bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
                upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
                found, is_finite = upper.tobytes(), not bool((upper & 0x7F80 == 0x7F80).any())
            case _:
                raise AssertionError(f"{target.dtype} is no type that a model computes in")
    if not is_finite:
        raise ModelError(
            f"{step.path}: {step.source.name} holds values that {target.dtype.value} cannot, or none at all; "
            "use another version of this model"
        )
    return found
