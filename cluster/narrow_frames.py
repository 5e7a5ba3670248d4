"""Which of a frame's rows travel in eight bits, and a frame so and back.

Rows of prompts do. A row of one token is a running answer's, whose next token must not depend on what else a step
computes, so it stays as computed. Both ends of a link tell from the rows alone. How numbers become eight bits is
`cluster.narrowing`'s business, and who asks for it the coordinator's.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cluster.frames import Frame
from cluster.narrowing import error_of, narrow, widen
from cluster.steps import Row, Step
from cluster.types import HostTensor

_Places = npt.NDArray[np.bool_]
"""One for each of a step's tokens."""


def may_narrow(row: Row) -> bool:
    return len(row.tokens) > 1


def narrow_tokens(step: Step) -> int:
    """How many of its tokens travel in eight bits where that is asked for."""
    return sum(len(row.tokens) for row in step.rows if may_narrow(row))


def narrowed(frame: Frame) -> Frame:
    """As it leaves a stage that sends on in eight bits."""
    places = _places(frame.step)
    if places.all():
        return replace(frame, tensors=(), narrow=tuple(map(narrow, frame.tensors)))
    if not places.any():
        return frame
    kept = tuple(_part(tensor, ~places) for tensor in frame.tensors)
    return replace(frame, tensors=kept, narrow=tuple(narrow(_part(tensor, places)) for tensor in frame.tensors))


def error_of_narrowing(frame: Frame) -> float | None:
    """The largest relative error, of its tensors, that those of its rows have which travel in eight bits."""
    places = _places(frame.step)
    if not places.any():
        return None
    errors = (error_of(_part(tensor, places)) for tensor in frame.tensors)
    return max((error for error in errors if error is not None), default=None)


def widened(frame: Frame) -> Frame:
    """As a stage computes with it."""
    wide = tuple(map(widen, frame.narrow))
    if frame.tensors:
        places = _places(frame.step)
        wide = tuple(_together(places, *pair) for pair in zip(wide, frame.tensors, strict=True))
    return replace(frame, tensors=wide, narrow=())


def _places(step: Step) -> _Places:
    return np.repeat([may_narrow(row) for row in step.rows], [len(row.tokens) for row in step.rows])


def _part(tensor: HostTensor, places: _Places) -> HostTensor:
    picked = _by_token(tensor)[places]
    return HostTensor(tensor.dtype, (len(picked), *tensor.shape[1:]), picked.reshape(-1).data)


def _together(places: _Places, there: HostTensor, elsewhere: HostTensor) -> HostTensor:
    kept = _by_token(elsewhere)
    whole = np.empty((len(places), kept.shape[1]), np.uint8)
    whole[places], whole[~places] = _by_token(there), kept
    return HostTensor(there.dtype, (len(places), *there.shape[1:]), whole.reshape(-1).data)


def _by_token(tensor: HostTensor) -> npt.NDArray[np.uint8]:
    flat = np.frombuffer(tensor.data, np.uint8)
    return flat.reshape(tensor.shape[0], len(flat) // tensor.shape[0])
