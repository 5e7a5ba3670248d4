"""A stand-in for CUDA graphs on a processor: it records torch's operations once and computes them again, from the same
tensors, without Python. Whatever Python put into them (a length, an address, a mask) is frozen, as it would be on a
card; whoever asks a tensor for its value while it is recorded is refused, as there. And engines that compute so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from node.engine import Engine
from node.engines.torch.captured import Means
from node.engines.torch.engine import TorchEngine
from node.engines.torch.ragged import Attend, Ragged
from node.engines.torch.recording import Compute
from node.engines.torch.scoring import Scoring
from tests.oracle.conftest import TOLERANCE
from tests.oracle.pipelines import load_pipeline, stage_specs
from tests.oracle.reference import Reference, assert_same
from tests.triton_stand_in import load_kernels

_aten = torch.ops.aten
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.item.default,
    _aten.is_nonzero.default,
    _aten.resolve_neg.default,  # what is asked first of a tensor that becomes a list or an array
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
}


class _Tape(TorchDispatchMode):
    """The operations of one computation."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexes = args[1] if function is _aten.index.Tensor else ()
        if function in _WAITS or any(index is not None and index.dtype == torch.bool for index in indexes):
            raise RuntimeError(f"operation not permitted while a step is recorded: {function}")
        result = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        now: dict[int, torch.Tensor] = {}

        def current(value: Any) -> Any:
            return now.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for function, args, kwargs, result in self._calls:
            again = function(*tree_map(current, args), **tree_map(current, kwargs))
            now.update(zip(map(id, tree_leaves(result)), tree_leaves(again), strict=True))
        return tuple(current(output) for output in outputs)


class FrozenRecorder:
    """See `recording.Recorder`. Counts what happens; no more than `rows_max` rows fit into its memory."""

    def __init__(self, rows_max: int = 1 << 20) -> None:
        self.recorded = 0
        self.replayed = 0
        self._rows_max = rows_max

    def record(self, compute: Compute) -> Compute:
        warm = compute()
        if len(warm[0]) > self._rows_max:
            raise MemoryError("no room for another record")
        tape = _Tape()
        with tape:
            outputs = compute()
        self.recorded += 1

        def replay() -> tuple[torch.Tensor, ...]:
            self.replayed += 1
            return tape.replay(outputs)

        return replay


# A kernel is one operation to torch, so it is one on the tape as well.
_library = torch.library.Library("potluck_tests", "DEF")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor places, Tensor positions, int? window, float? scaling,"
    " float? softcap, Tensor? sinks, int reach) -> Tensor"
)
_ragged = Ragged(load_kernels(), programs=24)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    reach: int,
) -> torch.Tensor:
    return _ragged.attend(query, key, value, places, positions, Scoring(window, scaling, softcap, sinks), reach)


_library.impl("attend", _attend, "CPU")


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: torch.Tensor,
    positions: torch.Tensor,
    scoring: Scoring,
    reach: int,
) -> torch.Tensor:
    """`ragged.Attend` by the engine's own kernels."""
    how = (scoring.window, scoring.scaling, scoring.softcap, scoring.sinks)
    return torch.ops.potluck_tests.attend(query, key, value, places, positions, *how, reach)


def frozen_means(recorder: FrozenRecorder | None = None, attend: Callable[..., torch.Tensor] = attend) -> Means:
    return Means(attend, recorder or FrozenRecorder())


def pipeline(
    folder: Path,
    cuts: Sequence[int] = (),
    recorder: FrozenRecorder | None = None,
    attend: Attend = attend,
    bits: int | None = None,
) -> list[Engine]:
    specs = stage_specs(folder, cuts, bits=bits)
    return load_pipeline([lambda: TorchEngine(frozen_means(recorder, attend))] * len(specs), specs)


def assert_equal(ids: Sequence[int], logits: np.ndarray, reference: Reference) -> None:
    assert_same(ids, logits, reference, tolerance=TOLERANCE)


def assert_all_equal(found: Sequence[tuple[list[int], np.ndarray]], expected: Sequence[Reference]) -> None:
    for (ids, logits), answer in zip(found, expected, strict=True):
        assert_equal(ids, logits, answer)
