"""On which links a prompt's activations travel in eight bits, from what its frames took to arrive.

Which rows of a step are prompts' is `cluster.narrow_frames`' to say. Pure; it knows frames by their marks.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from cluster.errors import UsageError
from cluster.limits import FRAME_PAYLOAD_BYTES_MAX
from cluster.narrow_frames import narrow_tokens
from cluster.narrowing import narrow_bytes
from cluster.steps import StageMark, Step
from cluster.types import TensorSpec

PAYS_BYTES_S: Final = 100e6
"""Below this, what is not sent saves more than twice what narrowing and widening take: measured, 4.9 ms for each MiB of
16-bit numbers, and 1.2 and 0.9 on one core. At 37 MB/s 64 MiB took 1.0 s in place of 1.8; at 123 MB/s, on a busy
machine, 0.4 to 1.0 in place of 0.55."""

MEASURED_BYTES_MIN: Final = 256 << 10
"""Beyond a frame's first message, which says nothing of a link's rate: it is timed from its arrival on."""

_WINDOW: Final = 9
"""Frames of which the median counts: one that waited for a busy loop, or for a late packet, does not decide."""


class WireBits(enum.StrEnum):
    """What `serve --wire-bits` may say."""

    AS_COMPUTED = "as computed"
    EIGHT = "8"
    AUTO = "auto"


def read_wire_bits(text: str | None) -> WireBits:
    if text is None:
        return WireBits.AS_COMPUTED
    if text not in (WireBits.EIGHT, WireBits.AUTO):
        raise UsageError(f"expected --wire-bits 8 or auto, found {text!r}")
    return WireBits(text)


@dataclass(frozen=True, slots=True)
class LinkRate:
    """The path from one stage to the next."""

    bytes_s: float | None  # None while no frame was long enough to tell
    is_narrow: bool  # a prompt's activations travel on it in eight bits
    narrow_tokens: int  # that have done so


class Narrowing:
    """The links between the stages of one installed plan; link i leaves stage i."""

    def __init__(self, wanted: WireBits, boundary: Sequence[TensorSpec], stages: int) -> None:
        self._wanted = wanted
        self._boundary = tuple(boundary)
        self._rates: list[deque[float]] = [deque(maxlen=_WINDOW) for _ in range(stages - 1)]
        self._narrow_tokens = [0] * (stages - 1)

    @property
    def links(self) -> tuple[LinkRate, ...]:
        return tuple(
            LinkRate(self._bytes_s(link), self._pays(link), tokens) for link, tokens in enumerate(self._narrow_tokens)
        )

    def choose(self, step: Step) -> tuple[int, ...]:
        """The stages that send this step's prompts on in eight bits."""
        links = tuple(link for link in range(len(self._rates)) if self._pays(link))
        return links if links and narrow_tokens(step) else ()

    def note(self, marks: Sequence[StageMark], tokens: int, narrow: int, narrowing: Sequence[int]) -> None:
        """A step of so many tokens has arrived everywhere; `narrow` of them these stages had sent on in eight bits."""
        if len(marks) != len(self._rates) + 1:
            return
        for link, mark in enumerate(marks[1:]):
            fewer = narrow if link in narrowing else 0
            self._narrow_tokens[link] += fewer
            timed_bytes = self._frame_bytes(tokens - fewer, fewer) - FRAME_PAYLOAD_BYTES_MAX
            if timed_bytes >= MEASURED_BYTES_MIN and mark.receive_s > 0:
                self._rates[link].append(timed_bytes / mark.receive_s)

    def _frame_bytes(self, kept: int, narrow: int) -> int:
        return sum(kept * spec.token_bytes + narrow_bytes((narrow, *spec.shape)) for spec in self._boundary)

    def _bytes_s(self, link: int) -> float | None:
        return median(self._rates[link]) if self._rates[link] else None

    def _pays(self, link: int) -> bool:
        match self._wanted:
            case WireBits.AS_COMPUTED:
                return False
            case WireBits.EIGHT:
                return True
            case WireBits.AUTO:
                rate = self._bytes_s(link)
                return rate is not None and rate < PAYS_BYTES_S
