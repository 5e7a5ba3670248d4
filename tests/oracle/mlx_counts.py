"""What an MLX step costs a device, counted where it cannot be timed: evaluations, operations, and memory that moved.

MLX's CPU build is not what anyone serves with, so seconds say little here. An operation is a node of the graph that is
evaluated, but for views; where Metal has one kernel for a function (rotations, norms, attention) the CPU's graph has
its parts. So numbers compare with numbers of the same model only.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

_VIEWS = frozenset(
    {"Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Squeeze", "StopGradient", "Transpose", "Unflatten"}
)

_NODE = re.compile(r'label ?= ?"([A-Za-z_]+)", ?shape=rectangle')


@dataclass
class Counts:
    """Of everything evaluated so far."""

    started: int = 0  # evaluations that the host lets the device begin
    waits: int = 0  # for the end of them
    operations: list[int] = field(default_factory=list)  # of each, in order, of both kinds: a wait may find new ones


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """Counts what is evaluated meanwhile."""
    counts = Counts()
    evaluate, begin = mx.eval, mx.async_eval

    def waiting(*args: Any) -> None:
        counts.waits += 1
        counts.operations.append(operations(args))
        evaluate(*args)

    def going_on(*args: Any) -> None:
        counts.started += 1
        counts.operations.append(operations(args))
        begin(*args)

    with patch.context() as patched:
        patched.setattr(mx, "eval", waiting)
        patched.setattr(mx, "async_eval", going_on)
        yield counts


def operations(results: object) -> int:
    """Nodes of the graph behind these arrays that nobody has evaluated yet."""
    text = io.StringIO()
    mx.export_to_dot(text, *_arrays(results))
    return sum(node not in _VIEWS for node in _NODE.findall(text.getvalue()))


def addresses(arrays: object) -> list[int]:
    """Where these arrays lie in memory."""
    return [np.asarray(array).__array_interface__["data"][0] for array in _arrays(arrays)]


def _arrays(tree: object) -> list[mx.array]:
    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, dict):
        return _arrays(list(tree.values()))
    return [array for part in tree for array in _arrays(part)] if isinstance(tree, list | tuple) else []
