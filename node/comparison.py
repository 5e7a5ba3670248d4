"""How far what a stage computed is from what the whole model computes, and how far it may be.

Owns: what a reference has to tell, the measure of an error, and the tolerances with their reasons. Pure: knows
neither engines nor files. The references are in `node.engines.*`, each the library that the engine there slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from cluster.errors import BadLogits
from cluster.types import DType, HostTensor
from node.hardware import Device

Floats = npt.NDArray[np.float32]

DRAWN_TOKENS = 8
"""After so many tokens at the end logits are compared; after each but the first where there are fewer."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest error of one layer, by what differs between it and the reference."""

    same: float  # only how the input is cut and attended to: the same library computes on the same device
    other: float  # another library's or device's order of operations as well


TOLERANCES = {
    DType.F32: Tolerance(same=2e-5, other=1e-4),
    DType.F16: Tolerance(same=1e-2, other=4e-2),
    DType.BF16: Tolerance(same=6e-2, other=3e-1),
}
"""Two to nine times the largest error of a right layer, measured on CPUs over random models of four families, wide and
narrow, and the built-in one: 5e-6 (same) and 1.1e-5 (other) in F32, 3.2e-3 and 1.2e-2 in F16, 1.5e-2 and 1.2e-1 in
BF16, whose numbers lie up to 0.8 % apart and where the libraries round at different places (Gemma's norms even their
weights). A wrong base of the rotation gave 0.3 to 3 there, a lost window 1 to 3."""

REROUTED = 0.8
"""What several layers with experts may be off by in 16 bits. Where a router holds two experts about level, rounding
decides, and every later token looks back at what that token became: 0.15 was seen on six layers that are right. Two of
six layers left out gave 2.3 and more."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What the whole model computes on `tokens`, as its own library runs it on `device`."""

    device: Device
    tokens: tuple[int, ...]
    hidden: tuple[Floats, ...]  # [tokens, hidden size]: [i] enters layer i, the last one leaves the last layer
    logits: Floats  # [drawn tokens, vocabulary], after the last ones
    inputs: Floats | None = None  # [tokens, layers, width] where layers have inputs of their own

    def __post_init__(self) -> None:
        # F16 ends at 65,504, which some models' hidden states pass.
        for index, array in enumerate((*self.hidden, self.logits)):
            if not np.isfinite(array).all():
                where = "the logits" if index == len(self.hidden) else f"what enters layer {index}"
                raise BadLogits(
                    f"the reference itself has infinity or NaN in {where}: there is nothing to compare with"
                )


def drawn_tokens(tokens: int) -> int:
    """How many of so many tokens, at the end, are drawn after."""
    return min(DRAWN_TOKENS, tokens - 1)


def tolerance(dtype: DType, layers: int, *, same: bool, routed: bool) -> float:
    """Roundings of several layers add up like a random walk: with the root of their number."""
    known = TOLERANCES[dtype]
    rounding = (known.same if same else known.other) * sqrt(layers)
    return max(rounding, REROUTED) if layers > 1 and _may_reroute(dtype, routed) else rounding


def errors_of(found: Floats, expected: Floats, path: Sequence[Floats]) -> Floats:
    """For each token the largest |difference|, relative to the rms of the reference.

    `path` is the reference from what entered to what left, and the scale is the largest on it: of an element itself
    where that is above the token's rms. Models keep a few elements a thousand times larger than the rest, whose
    rounding alone exceeds the rest, and some layer takes them away again.
    """
    scales = [np.maximum(np.abs(at), np.sqrt(np.mean(np.square(at), axis=-1, keepdims=True))) for at in path]
    scale = np.maximum(np.maximum.reduce(scales), np.finfo(np.float32).tiny)
    return np.asarray((np.abs(found - expected) / scale).max(axis=-1), dtype=np.float32)


def summary(errors: Floats, dtype: DType, *, routed: bool) -> float:
    """The worst token's error; the median token's where a few may rightly have gone to another expert. Those are off
    by a third and more: with 128 experts in BF16 about one token in fifteen."""
    return float(np.median(errors) if _may_reroute(dtype, routed) else np.max(errors))


def _may_reroute(dtype: DType, routed: bool) -> bool:
    return routed and dtype is not DType.F32


def to_host(array: Floats, dtype: DType) -> HostTensor:
    """What a stage takes, rounded to `dtype` where the reference was finer."""
    match dtype:
        case DType.F32 | DType.F16:
            data = array.astype(np.float32 if dtype is DType.F32 else np.float16).tobytes()
        case DType.BF16:
            bits = np.ascontiguousarray(array).view(np.uint32)
            # The upper half of a float32, rounded to the nearest and to even between two.
            data = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
        case _:
            raise ValueError(f"no stage computes in {dtype}")
    return HostTensor(dtype, array.shape, data)


def from_host(tensor: HostTensor) -> Floats:
    """What a stage gave, exactly."""
    if tensor.dtype is DType.BF16:
        wide = np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor.shape)
    stored = np.frombuffer(tensor.data, np.float32 if tensor.dtype is DType.F32 else np.float16)
    return stored.astype(np.float32).reshape(tensor.shape)
