"""cluster/narrow_frames.py: prompts' rows lose precision, whatever else a step computes, and answers' rows none."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.frames import Frame
from cluster.narrow_frames import error_of_narrowing, narrow_tokens, narrowed, widened
from cluster.narrowing import error_of, narrow, widen
from cluster.plan import Fence
from cluster.steps import Row, Step
from cluster.types import DeploymentId, DType, Epoch, HostTensor, SequenceId, StepId
from node.comparison import Floats, to_host

FENCE = Fence(DeploymentId("d1"), Epoch(7))
SHAPES = ((64,), (3, 40))


def numbers(tokens: int, shape: tuple[int, ...]) -> Floats:
    return np.random.default_rng(tokens).standard_normal((tokens, *shape)).astype(np.float32)


def frame(*lengths: int) -> Frame:
    rows = tuple(Row(SequenceId(n), 0, (1,) * length) for n, length in enumerate(lengths))
    tensors = tuple(to_host(numbers(sum(lengths), shape), DType.BF16) for shape in SHAPES)
    return Frame(FENCE, Step(StepId(1), (), rows), tensors)


def tokens(tensor: HostTensor, first: int, last: int) -> HostTensor:
    size_bytes = len(tensor.data) // tensor.shape[0]
    return HostTensor(
        tensor.dtype, (last - first, *tensor.shape[1:]), tensor.data[first * size_bytes : last * size_bytes]
    )


@pytest.mark.parametrize("lengths", [(1, 1, 5), (5, 1), (1, 5, 1, 7, 1), (2,), (5, 7)])
def test_each_prompt_travels_as_if_it_were_alone_and_each_answer_as_computed(lengths: tuple[int, ...]) -> None:
    sent = frame(*lengths)
    found = widened(narrowed(sent))
    assert not found.narrow
    for before, after in zip(sent.tensors, found.tensors, strict=True):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        at = 0
        for length in lengths:
            row = tokens(before, at, at + length)
            expected = row if length == 1 else widen(narrow(row))
            assert bytes(tokens(after, at, at + length).data) == bytes(expected.data)
            at += length


def test_only_prompts_tokens_are_in_eight_bits() -> None:
    found = narrowed(frame(1, 5, 1, 7))
    assert narrow_tokens(found.step) == 12
    assert [tensor.shape for tensor in found.narrow] == [(12, *shape) for shape in SHAPES]
    assert [tensor.shape for tensor in found.tensors] == [(2, *shape) for shape in SHAPES]


def test_a_step_of_answers_alone_stays_as_it_is() -> None:
    sent = frame(1, 1, 1)
    assert narrowed(sent) is sent
    assert narrow_tokens(sent.step) == 0


def test_only_the_error_of_what_travels_in_eight_bits_is_told() -> None:
    assert error_of_narrowing(frame(1, 1)) is None
    error = error_of_narrowing(frame(1, 5, 1))
    assert error is not None
    prompt = tuple(tokens(tensor, 1, 6) for tensor in frame(1, 5, 1).tensors)
    assert error == max(error_of(tensor) or 0.0 for tensor in prompt)
