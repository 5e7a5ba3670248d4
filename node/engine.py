"""What a stage must offer, whatever library computes it.

An engine owns a slice of a model and the KV cache of its layers. It knows nothing of plans, neighbours,
sockets or sampling. Calls come from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cluster.rewinding import Rewind
from cluster.steps import Boundary, Row
from cluster.types import Backend, LayerRange, SequenceId, TensorSpec

Logits = npt.NDArray[np.float32]
"""[rows that draw, vocabulary], in the order of those rows; final soft-caps applied, nothing else."""


AwaitTensors = Callable[[Iterable[str]], None]
"""Returns once these tensors' bytes are in the folder; raises what keeps them from coming. The rest of the slice may
be under way: what is read without waiting reads as zeros."""


def everything_is_here(_names: Iterable[str]) -> None:
    """For a folder that is complete."""


@dataclass(frozen=True, slots=True)
class StageSpec:
    """Everything an engine needs to hold layers [first, last) of the model in `folder`.

    `folder` looks like the model's own folder: config.json, safetensors files, index. On a machine that
    fetched only its slice the files are sparse: the header and the owned tensors' bytes are real, the rest
    reads as zeros. So read owned tensors only.
    """

    folder: Path
    layers: LayerRange
    layer_count: int
    boundary: tuple[TensorSpec, ...]  # what enters (unless first) and leaves (unless last) this stage, per token
    device: str  # cpu, cuda:0, mps for torch; cpu, metal for mlx
    threads: int | None
    kv_tokens: int  # cache positions promised over all sequences
    context_tokens: int  # the longest single sequence
    bits: int | None = None  # pack full-precision weights while they are read; None: as they are stored
    await_tensors: AwaitTensors = everything_is_here  # before the values of stored tensors are read, by their names

    @property
    def is_first(self) -> bool:
        return self.layers.first == 0

    @property
    def is_last(self) -> bool:
        return self.layers.last == self.layer_count


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load has come; reported at least once a tensor or a few MiB."""

    done_bytes: int
    total_bytes: int


Progress = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the cache holds and may hold, in positions and in bytes as the engine really keeps them."""

    kv_tokens: int
    kv_tokens_used: int
    sequences: int
    weight_bytes: int
    kv_bytes: int  # allocated now


class Engine(Protocol):
    """A slice of a model with its cache. One instance is loaded once."""

    @property
    def backend(self) -> Backend: ...

    @property
    def rewind(self) -> Rewind:
        """Where sequences can be cut back to: the same on every stage of a model, whatever its layers are."""
        ...

    def load(self, spec: StageSpec, progress: Progress) -> None:
        """Load the slice. Raises ModelError when a tensor is missing, damaged or of the wrong shape, or when
        the model has a part that this engine cannot compute exactly. Afterwards every owned parameter came
        from a file and no unowned one exists."""
        ...

    def step(self, rows: Sequence[Row], inputs: Boundary | None) -> Boundary | Logits:
        """Compute one ragged batch. `inputs` is None on the first stage, which reads the rows' token ids.
        Tensors are packed: the rows' tokens one after another along the leading axis. The last stage returns
        logits after the last token of each row that has a `draw`. Row.start must equal the sequence's cached
        length (a new sequence starts at 0); otherwise ValueError, and the cache is unchanged."""
        ...

    def fork(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        """Begin `dst` as the first `length` positions of `src`, or as many of these as `rewind` allows; returns how
        many. The caller computes the rest."""
        ...

    def move(self, src: SequenceId, dst: SequenceId, length: int) -> int:
        """As `fork`, of a `src` that is forgotten: nothing is copied."""
        ...

    def trim(self, seq: SequenceId, length: int) -> int:
        """Cut `seq` back to `length`, or to as many of these positions as `rewind` allows; returns how many."""
        ...

    def drop(self, seq: SequenceId) -> None:
        """Free `seq`; unknown ones are ignored."""
        ...

    def length(self, seq: SequenceId) -> int:
        """Cached positions of `seq`; 0 when unknown."""
        ...

    def capacity(self) -> Capacity: ...

    def close(self) -> None:
        """Free weights and cache; the engine cannot be used afterwards."""
        ...


Finish = Callable[[], Boundary | Logits]
"""Waits for a step that has begun; raises what went wrong with it."""


@runtime_checkable
class WorksAhead(Protocol):
    """An engine whose device computes one step while the host prepares the next."""

    def begin(self, rows: Sequence[Row], inputs: Boundary | None) -> Finish:
        """`step` in two parts. The rows' positions count at once, and raising here is a step that never was. Steps are
        finished in the order in which they began; verbs wait until all have been."""
        ...
