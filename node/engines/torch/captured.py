"""Steps in which every row is one token, computed at once and, where the device can, without Python.

Owns the tensors that such a step reads (token ids or what enters, positions, where caches lie), what of them has to be
uploaded again, and a record of the step for each number of rows, made when it is first needed. Numbers of rows are
powers of two; rows for nobody fill up. What cannot be recorded is computed by the same code, unrecorded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from cluster.limits import RECORDED_BYTES_MAX, STEP_ROWS_MAX
from cluster.steps import Boundary, Row
from node.engine import Logits, StageSpec
from node.engines.torch.attention import Batch
from node.engines.torch.kv import Places
from node.engines.torch.ragged import PLACE_FIELDS, Attend, DecodeRows, Ragged
from node.engines.torch.recording import Compute, GraphRecorder, Recorder
from node.engines.torch.slicing import Passing, SlicedModel
from node.engines.torch.tensors import TORCH_DTYPES, from_host, to_host

_log = logging.getLogger(__name__)

RECORDED_ROWS_MAX: Final = 64
"""Above, computing takes longer than Python does, and a record takes memory with every row."""

_PROGRAMS_PER_PROCESSOR: Final = 4
"""Of a kernel, under way at once on each of a card's processors, so that some compute while others wait for memory. How
many are best has not been measured."""


@dataclass(frozen=True, slots=True)
class Means:
    """What a device offers for such steps."""

    attend: Attend
    recorder: Recorder


def means_of(device: torch.device) -> Means | None:
    """None where rows are computed one by one."""
    if device.type != "cuda":
        return None
    try:
        from node.engines.torch import ragged_kernels
    except ImportError as error:
        _log.warning("decode steps are not recorded on %s, which makes them slower: %s", device, error)
        return None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    attend = Ragged(ragged_kernels, _PROGRAMS_PER_PROCESSOR * processors).attend
    return Means(attend, GraphRecorder(device, RECORDED_BYTES_MAX))


def decoding_rows(rows: Sequence[Row]) -> int:
    """How many at the head of a step are of this kind. A sequence's first token has nowhere to go yet."""
    others = (index for index, row in enumerate(rows) if row.start == 0 or len(row.tokens) != 1)
    return min(next(others, len(rows)), STEP_ROWS_MAX)


class DecodeSteps:
    """Such steps of one slice."""

    def __init__(self, sliced: SlicedModel, spec: StageSpec, device: torch.device, means: Means) -> None:
        self._sliced = sliced
        self._spec = spec
        self._device = device
        self._attend = means.attend
        self._recorder = means.recorder
        self._recorded_rows_max = RECORDED_ROWS_MAX
        layers = len(spec.layers)
        self._numbers = torch.zeros(2 * STEP_ROWS_MAX, dtype=torch.int64, device=device)  # of n rows: ids, positions
        self._every = torch.arange(STEP_ROWS_MAX, device=device)
        self._entering = tuple(
            torch.zeros((STEP_ROWS_MAX, *tensor.shape), dtype=TORCH_DTYPES[tensor.dtype], device=device)
            for tensor in (() if sliced.is_first else spec.boundary)
        )
        self._places = torch.zeros((STEP_ROWS_MAX, layers, PLACE_FIELDS), dtype=torch.int64, device=device)
        self._nobody: Places = np.zeros((layers, PLACE_FIELDS), dtype=np.int64)
        self._uploaded: list[Places] = [self._nobody] * STEP_ROWS_MAX  # what `_places` holds of each row
        self._computes: dict[int, Compute] = {}

    def beside(self, rows: Sequence[Row], places: Sequence[Places]) -> DecodeRows:
        """Such rows at the head of a step that has others too, which is computed from Python."""
        self._numbers[: len(rows)].copy_(torch.tensor([row.start for row in rows]))
        self._place(places)
        return DecodeRows(
            self._attend, self._places[: len(rows)], self._numbers[: len(rows)], self._spec.context_tokens
        )

    def compute(self, rows: Sequence[Row], inputs: Boundary | None, places: Sequence[Places]) -> Boundary | Logits:
        """`Engine.step` of rows that have been checked. `places` has room for each row's token."""
        count = 1 << (len(rows) - 1).bit_length()
        with self.on_device():
            compute = self._computes.get(count) or self._prepare(count)
            self._upload(rows, inputs, places, count)
            outputs = compute()
            return self._to_host(rows, outputs)

    def compile_all(self) -> None:
        """Compute for nobody, with each number of rows that may be recorded: kernels are compiled for each, which takes
        seconds where it was never done, and at a load nobody waits for a token."""
        self._place([self._nobody] * RECORDED_ROWS_MAX)
        with self.on_device():
            for power in range(RECORDED_ROWS_MAX.bit_length()):
                self._compute(1 << power)

    def close(self) -> None:
        """Free what was recorded."""
        self._computes.clear()

    def on_device(self) -> AbstractContextManager[object]:
        """What kernels have to be started in."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _prepare(self, count: int) -> Compute:
        """Record the step for so many rows if that is possible, all of them for nobody: nothing is written."""

        def compute() -> tuple[torch.Tensor, ...]:
            return self._compute(count)

        self._place([self._nobody] * count)
        self._computes[count] = compute
        if count <= self._recorded_rows_max:
            try:
                self._computes[count] = self._recorder.record(compute)
            except Exception as error:  # noqa: BLE001 - whatever it is, the step can be computed without
                self._recorded_rows_max = count // 2
                _log.warning(
                    "decode steps of %d rows and more are not recorded, which makes them slower: %s: %s",
                    count,
                    type(error).__name__,
                    error,
                )
        return self._computes[count]

    def _compute(self, count: int) -> tuple[torch.Tensor, ...]:
        """What is recorded. Reads the tensors above, and nothing else that changes."""
        ids, positions = self._numbers[:count], self._numbers[_aligned(count) :][:count]
        decode = DecodeRows(self._attend, self._places[:count], positions, self._spec.context_tokens)
        batch = Batch((), decode=decode)
        sliced = self._sliced
        entering = sliced.enter(ids) if sliced.is_first else Passing(*(tensor[:count] for tensor in self._entering))
        if sliced.is_last:
            return (sliced.logits(entering, positions, batch, self._every[:count]).float(),)
        return sliced.hidden_states(entering, positions, batch).tensors

    def _upload(self, rows: Sequence[Row], inputs: Boundary | None, places: Sequence[Places], count: int) -> None:
        begin = _aligned(count)
        numbers = torch.zeros(begin + count, dtype=torch.int64)
        numbers[: len(rows)] = torch.tensor([row.tokens[0] for row in rows])
        numbers[begin : begin + len(rows)] = torch.tensor([row.start for row in rows])
        self._numbers[: begin + count].copy_(numbers)
        for tensor, entering in zip(inputs or (), self._entering, strict=True):
            entering[: len(rows)].copy_(from_host(tensor, torch.device("cpu")))
        self._place([*places, *[self._nobody] * (count - len(rows))])

    def _place(self, wanted: Sequence[Places]) -> None:
        """Upload where caches lie, of rows for which that has changed."""
        changed = [row for row, places in enumerate(wanted) if self._uploaded[row] is not places]
        if changed:
            first, last = changed[0], changed[-1] + 1
            self._places[first:last].copy_(torch.from_numpy(np.stack(wanted[first:last])))
            self._uploaded[first:last] = wanted[first:last]

    def _to_host(self, rows: Sequence[Row], outputs: tuple[torch.Tensor, ...]) -> Boundary | Logits:
        if not self._sliced.is_last:
            return tuple(
                to_host(tensor[: len(rows)], spec) for tensor, spec in zip(outputs, self._spec.boundary, strict=True)
            )
        drawing = [index for index, row in enumerate(rows) if row.draw is not None]
        if not drawing:
            return np.empty((0, self._sliced.vocabulary), dtype=np.float32)
        logits: Logits = outputs[0][: drawing[-1] + 1].cpu().numpy()
        return np.ascontiguousarray(logits) if len(drawing) == len(logits) else logits[drawing]


def _aligned(count: int) -> int:
    """Where numbers may begin behind so many: at a multiple of 16 bytes, or Triton compiles kernels of their own."""
    return count + count % 2
