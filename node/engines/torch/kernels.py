"""How many compiled products the libraries below torch keep on a processor, and where.

Owns: two settings of oneDNN and of torch's layer above it. In 16 bits they compile a product for every shape that they
meet, and experts and prompts have ever new ones; each keeps 1,024 of them by default, at about a quarter of a MiB each,
which is half a GiB that no plan knows. Both read their setting once, at the first product.
"""

from __future__ import annotations

import os
from typing import Final

from cluster.quantities import KIB

KERNELS_KEPT: Final = 32
"""In each library: the shapes of one layer's matrices, of the head and of attention, for some numbers of rows."""

MAPPED_FROM_BYTES: Final = 192 * KIB
"""Blocks that are mapped apart from the heap. It is below the 252 KiB that oneDNN takes to compile a part of a product,
and uses a page or two of: in the heap, what is left of thousands of these becomes holes that tensors fill, and small
models in 16 bits took 10 to 20 MiB more than their plan. A decode step of one row makes no block as large, but logits
of a large vocabulary."""

_SETTINGS: Final = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def keep_few_kernels() -> None:
    """Bound what is kept from now on, in this whole process; whoever set a bound already has reasons."""
    for name in _SETTINGS:
        os.environ.setdefault(name, str(KERNELS_KEPT))
