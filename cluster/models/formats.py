"""How a checkpoint packs its matrices, as its configuration states it.

Owns: the vocabulary of packings, which engines read each, and the reading of `quantization` (MLX's words) and
`quantization_config` (everybody else's). Which tensors belong together is `cluster.models.matrices`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from cluster.errors import ModelError
from cluster.models.integers import (
    GROUP_MAX,
    Integers,
    read_awq,
    read_gptq,
    read_pack_quantized,
    refuse_more_than_weights,
)
from cluster.models.layout import canonical_name
from cluster.types import Backend, Format

_OVERRIDES_MAX = 1 << 20  # the largest models have some 100,000 matrices


class Packing(enum.StrEnum):
    """How the numbers of one matrix are stored."""

    NONE = "unpacked"
    AFFINE = "affine"  # MLX: codes times a scale plus a bias, for each group of columns
    MXFP4 = "mxfp4"  # four-bit floats, 32 of which share an exponent: MLX's layout and gpt-oss' own
    MXFP8 = "mxfp8"  # MLX: eight-bit floats, 32 of which share an exponent
    NVFP4 = "nvfp4"  # MLX: four-bit floats, 16 of which share an eight-bit float
    FP8 = "fp8"  # eight-bit floats (E4M3) with a scale for each block, row, or the whole matrix
    AWQ = "awq"  # four-bit codes in an order of their own, input by output
    GPTQ = "gptq"  # codes along the inputs, perhaps in groups out of order
    INTEGERS = "pack-quantized"  # compressed-tensors: codes along the inputs of each output


READERS: Mapping[Packing, frozenset[Backend]] = {
    Packing.NONE: frozenset(Backend),
    Packing.AFFINE: frozenset(Backend),
    Packing.MXFP4: frozenset(Backend),
    Packing.MXFP8: frozenset({Backend.MLX}),
    Packing.NVFP4: frozenset({Backend.MLX}),
    Packing.FP8: frozenset(Backend),
    Packing.AWQ: frozenset(Backend),
    Packing.GPTQ: frozenset(Backend),
    Packing.INTEGERS: frozenset(Backend),
}
"""The engines that compute with a packing exactly, in tests."""

HALF_EXPERTS: Final = Format("unpacked experts in 16 bits")
"""Not a packing, and yet not read everywhere: MLX has no kernel for these on a processor."""


def readable_formats(backend: Backend, device: str) -> frozenset[Format]:
    """What the engine reads on a device, as a node says it."""
    formats = {Format(packing) for packing, readers in READERS.items() if backend in readers}
    return frozenset(formats if (backend, device) == (Backend.MLX, "cpu") else formats | {HALF_EXPERTS})


PACKED_IN_MEMORY: Mapping[Packing, frozenset[Backend]] = {**READERS, Packing.FP8: frozenset({Backend.TORCH})}
"""The engines in whose memory a packing takes what it takes on disk; others unpack it when they load."""

MLX_MODES = frozenset({Packing.AFFINE, Packing.MXFP4, Packing.MXFP8, Packing.NVFP4})
"""What MLX packs; transformers, for one, cannot read it."""


@dataclass(frozen=True, slots=True)
class Width:
    """Bits of a code, and columns that share a scale."""

    bits: int
    group: int


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a configuration states for all matrices. Single ones may be left out: the files say which are packed."""

    kind: Packing
    bits: int
    group: int  # columns that share a scale; 0: all of a row
    overrides: Mapping[str, Width] = field(default_factory=dict)  # of matrices by logical name
    block: tuple[int, int] | None = None  # rows and columns that share a scale of FP8; None: a row or everything
    symmetric: bool = False  # of integers: every zero is half the range
    zeros_are_one_less: bool = False  # of GPTQ: as files of its first version hold them
    reordered: bool = False  # of integers: the columns of a group lie anywhere

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.kind}" + (f", group {self.group}" if self.group else "")

    @property
    def width(self) -> Width:
        return Width(self.bits, self.group)


def read_quantization(config: Mapping[str, object], where: str) -> Quantization | None:
    """How the weights are packed; None in full precision. `config` is the outer configuration."""
    found = config.get("quantization") or config.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise ModelError(f"{where}: expected an object as quantization_config, found {found!r:.80}")
    match found.get("quant_method"):
        case None:
            return _of_mlx(found, where)
        case "mxfp4":
            # As gpt-oss is published. The format has no settings: 32 numbers of four bits share an exponent.
            return Quantization(Packing.MXFP4, 4, 32)
        case "fp8":
            return Quantization(Packing.FP8, 8, 0, block=_block(found.get("weight_block_size"), where))
        case "awq":
            return _of_integers(Packing.AWQ, read_awq(found, where))
        case "gptq":
            return _of_integers(Packing.GPTQ, read_gptq(found, where))
        case "compressed-tensors" if found.get("format") == Packing.INTEGERS:
            return _of_integers(Packing.INTEGERS, read_pack_quantized(found, where))
        case "compressed-tensors":
            return _of_compressed_tensors(found, where)
        case method:
            raise _unread(method, where)


def _of_integers(kind: Packing, stated: Integers) -> Quantization:
    return Quantization(
        kind,
        stated.bits,
        stated.group,
        symmetric=stated.symmetric,
        zeros_are_one_less=stated.zeros_are_one_less,
        reordered=stated.reordered,
    )


def _of_mlx(found: Mapping[str, object], where: str) -> Quantization:
    mode = found.get("mode", Packing.AFFINE)
    if not isinstance(mode, str) or mode not in MLX_MODES:
        raise _unread(mode, where)
    if len(found) > _OVERRIDES_MAX:
        raise ModelError(f"{where}: expected settings for at most {_OVERRIDES_MAX} matrices, found {len(found)}")
    overrides = {
        canonical_name(f"{path}.weight"): Width(*_width(how, where))
        for path, how in found.items()
        if isinstance(how, dict) and {"bits", "group_size"} <= how.keys()
    }
    bits, group = _width(found, where)
    if group == 0:
        raise ModelError(f"{where}: expected quantization with group_size from 1, found -1")
    return Quantization(Packing(mode), bits, group, overrides)


def _of_compressed_tensors(found: Mapping[str, object], where: str) -> Quantization:
    """One group of settings for all packed matrices; several of them may mean several formats in one file."""
    groups = found.get("config_groups")
    settings = list(groups.values()) if isinstance(groups, dict) else []
    weights = settings[0].get("weights") if len(settings) == 1 and isinstance(settings[0], dict) else None
    if not isinstance(weights, dict):
        raise ModelError(f"{where}: expected one of config_groups with weights, found {groups!r:.80}")
    refuse_more_than_weights(found, where)
    match found.get("format"):
        case "float-quantized" if weights.get("num_bits") == 8:
            if (kind := weights.get("type", "float")) != "float":
                raise _unread(f"float-quantized weights of type {kind}", where)
            if (strategy := weights.get("strategy", "tensor")) not in ("tensor", "channel", "block"):
                raise _unread(f"float-quantized weights with strategy {strategy}", where)
            block = weights.get("block_structure") if weights.get("strategy") == "block" else None
            return Quantization(Packing.FP8, 8, 0, block=_block(block, where))
        case other:
            raise _unread(f"compressed-tensors {other}", where)


def _width(found: Mapping[str, object], where: str) -> tuple[int, int]:
    bits, group = found.get("bits"), found.get("group_size")
    if type(bits) is not int or type(group) is not int or not 1 <= bits <= 8 or not (group == -1 or group >= 1):
        raise ModelError(f"{where}: expected quantization with bits from 1 to 8 and group_size, found {found!r:.80}")
    if group > GROUP_MAX:
        raise ModelError(f"{where}: expected quantization with group_size up to {GROUP_MAX}, found {group}")
    return bits, max(group, 0)


def _block(found: object, where: str) -> tuple[int, int] | None:
    if found is None:
        return None
    if isinstance(found, list) and len(found) == 2:
        rows, columns = found
        if type(rows) is int and type(columns) is int and 1 <= min(rows, columns) <= max(rows, columns) <= GROUP_MAX:
            return rows, columns
    raise ModelError(f"{where}: expected a block of rows and columns that share a scale, found {found!r:.80}")


def _unread(name: object, where: str) -> ModelError:
    return ModelError(
        f"{where}: the weights are quantised as {name!r:.60}, which Potluck does not read; "
        "use the unquantised model or MLX's version of it"
    )
