"""The ways in which GGUF files store numbers: element types, and how many bytes a block of them takes.

Knows sizes alone; what the bytes of a block mean is `coordinator.gguf.blocks`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class GgmlType(enum.Enum):
    """An element type that Potluck reads: the number that files use, values in a block, bytes of a block."""

    F32 = (0, 1, 4)
    F16 = (1, 1, 2)
    Q4_0 = (2, 32, 18)
    Q4_1 = (3, 32, 20)
    Q5_0 = (6, 32, 22)
    Q5_1 = (7, 32, 24)
    Q8_0 = (8, 32, 34)
    Q4_K = (12, 256, 144)
    Q5_K = (13, 256, 176)
    Q6_K = (14, 256, 210)
    BF16 = (30, 1, 2)
    MXFP4 = (39, 32, 17)

    @property
    def block_values(self) -> int:
        """Neighbours in a row that are stored together."""
        return self.value[1]

    @property
    def block_bytes(self) -> int:
        return self.value[2]

    @property
    def is_packed(self) -> bool:
        """Whether values share a scale, rather than being numbers of their own."""
        return self.block_values > 1


@dataclass(frozen=True, slots=True)
class UnreadType:
    """An element type whose size is not known here, so that its tensors cannot be placed."""

    name: str


_READ = {kind.value[0]: kind for kind in GgmlType}

# For messages: a person knows the name, not the number.
_UNREAD = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip


def type_of(number: int) -> GgmlType | UnreadType:
    """What the number of an element type means."""
    return _READ.get(number) or UnreadType(_UNREAD.get(number, f"number {number}"))
