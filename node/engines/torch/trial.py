"""Whether decode steps at once give what rows one by one give, tried after a load and before the first request.

Some layers attend in ways of their own, some wait for the device, some kernels may not compile for a card: all of that
is found here, and costs speed, never an answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from cluster.steps import Boundary, Draw, Row, Sampling
from cluster.types import SequenceId
from node.engine import Logits, StageSpec
from node.engines.torch.attention import Span
from node.engines.torch.captured import DecodeSteps
from node.engines.torch.kv import SequenceCache
from node.engines.torch.tensors import from_host, to_host

_log = logging.getLogger(__name__)

Eagerly = Callable[[Row, Boundary | None, Span], Boundary | Logits]
"""A step of one row, computed as it is without all this."""

_DIFFERENCE_MAX: Final = 0.1
"""Of what both compute, in terms of its size. Rounding in 16 bits is below; a wrong position or address is not."""

_PROMPT_TOKENS, _DRAWN_TOKENS = 5, 3
_DRAW: Final = Draw(sampling=Sampling(seed=0, temperature=0.0), prompt_tokens=0)


def is_right(steps: DecodeSteps, eagerly: Eagerly, new: Callable[[], SequenceCache], spec: StageSpec) -> bool:
    """Whether `steps` may be used. If not, the log says why."""
    try:
        difference = _difference(steps, eagerly, new, spec)
        steps.compile_all()
    except Exception as error:  # noqa: BLE001 - whatever it is, rows can be computed one by one
        reason = f"{type(error).__name__}: {error}"
    else:
        if difference <= _DIFFERENCE_MAX:
            return True
        reason = f"they differ by {difference:.2g} from rows computed one by one"
    _log.warning("decode steps are computed row by row, which is slower: %s", reason)
    return False


def _difference(steps: DecodeSteps, eagerly: Eagerly, new: Callable[[], SequenceCache], spec: StageSpec) -> float:
    """The largest over some tokens, each at another length than the step was recorded with."""
    alone, at_once = new(), new()
    prompt = _row(0, _PROMPT_TOKENS)
    inputs = _inputs(spec, prompt)
    for sequence in (alone, at_once):
        eagerly(prompt, inputs, Span(0, _PROMPT_TOKENS, 0, sequence))
        sequence.commit(_PROMPT_TOKENS, {})
    largest = 0.0
    for start in range(_PROMPT_TOKENS, _PROMPT_TOKENS + _DRAWN_TOKENS):
        row = _row(start, 1)
        inputs = _inputs(spec, row)
        expected = _numbers(eagerly(row, inputs, Span(0, 1, start, alone)))
        found = _numbers(steps.compute([row], inputs, [at_once.places(row.end)]))
        for sequence in (alone, at_once):
            sequence.commit(row.end, {})
        size = float(np.linalg.norm(expected))
        largest = max(largest, float(np.linalg.norm(found - expected)) / size if size else np.inf)
    return largest


def _row(start: int, tokens: int) -> Row:
    return Row(seq=SequenceId(0), start=start, tokens=tuple(range(start + 1, start + 1 + tokens)), draw=_DRAW)


def _inputs(spec: StageSpec, row: Row) -> Boundary | None:
    """Something to compute with, where it is not the tokens."""
    if spec.is_first:
        return None
    generator = torch.Generator().manual_seed(row.start)
    return tuple(
        to_host(torch.randn((len(row.tokens), *tensor.shape), generator=generator), tensor) for tensor in spec.boundary
    )


def _numbers(result: Boundary | Logits) -> npt.NDArray[np.float64]:
    if isinstance(result, np.ndarray):
        return result.astype(np.float64)
    cpu = torch.device("cpu")
    return np.concatenate([from_host(tensor, cpu).double().numpy().ravel() for tensor in result])
