"""Frames survive the wire unchanged, and bytes that break the contract are refused before they are believed."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.codec import Decoder, Expectation, encode
from cluster.errors import RequestError, StaleFrame, WireError
from cluster.frames import Frame, Hello, Message, Outcome, StreamRole
from cluster.limits import FRAME_PAYLOAD_BYTES_MAX, GRPC_MESSAGE_BYTES_MAX, PROTOCOL_VERSION, STEP_ROWS_MAX
from cluster.narrowing import NarrowTensor, narrow, narrow_bytes
from cluster.plan import Fence
from cluster.steps import (
    Draw,
    Drawn,
    Drop,
    Fork,
    Honoured,
    Move,
    Row,
    Sampling,
    StageMark,
    Step,
    StepDone,
    StepFailed,
    Trim,
)
from cluster.types import AdapterId, DeploymentId, DType, Epoch, HostTensor, SequenceId, StepId, TensorSpec

FENCE = Fence(DeploymentId("d1"), Epoch(7))
WIDTH = 4
HIDDEN = (TensorSpec("hidden", (WIDTH,), DType.BF16),)
VOCABULARY = 100


def expectation(boundary: tuple[TensorSpec, ...] = HIDDEN) -> Expectation:
    return Expectation(FENCE, boundary, VOCABULARY)


def hidden(tokens: int, width: int = WIDTH) -> HostTensor:
    return HostTensor(DType.BF16, (tokens, width), bytes(index % 251 for index in range(tokens * width * 2)))


def frame(rows: tuple[Row, ...], **changes: object) -> Frame:
    tokens = sum(len(row.tokens) for row in rows)
    values = {"fence": FENCE, "step": Step(StepId(3), (), rows), "tensors": (hidden(tokens),)} | changes
    return Frame(**values)  # type: ignore[arg-type]


def decode(messages: list[bytes], expected: Expectation | None = None) -> Message | None:
    decoder = Decoder(expected or expectation())
    results = [decoder.feed(message) for message in messages]
    assert all(result is None for result in results[:-1])
    return results[-1]


def plain(message: Message | None) -> Message | None:
    """With tensors as bytes, so that frames compare."""
    if not isinstance(message, Frame):
        return message
    tensors = tuple(HostTensor(tensor.dtype, tensor.shape, bytes(tensor.data)) for tensor in message.tensors)
    narrowed = tuple(NarrowTensor(tensor.dtype, tensor.shape, bytes(tensor.data)) for tensor in message.narrow)
    return replace(message, tensors=tensors, narrow=narrowed)


def seq(number: int) -> SequenceId:
    return SequenceId(number)


ROWS = (
    Row(seq(1), 0, (5, 6, 7)),
    Row(
        seq(2),
        41,
        (99,),
        Draw(Sampling(seed=2**64 - 1, choice=3, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1), 40, (0, 2)),
        AdapterId("a"),
    ),
)


@pytest.mark.parametrize(
    "message",
    [
        Hello(FENCE, 2, StreamRole.RESULTS),
        frame(ROWS),
        frame(ROWS, honoured=(Honoured(seq(9), 4),), marks=(StageMark(0, 0.1, 0.2, 0.3),)),
        frame((), tensors=(), step=Step(StepId(0), (Fork(seq(1), seq(2), 3), Trim(seq(1), 0), Drop(seq(4))), ())),
        frame(ROWS, tensors=(hidden(1),), narrow=(narrow(hidden(3)),)),
        frame(ROWS[:1], tensors=(), narrow=(narrow(hidden(3)),)),
        frame(ROWS, narrowing=(0, 2, 1023)),
        frame((), tensors=(), step=Step(StepId(0), (Move(seq(1), seq(2), 3),), ())),
        frame(ROWS, tensors=(), failure=StepFailed(StepId(3), 1, "no room", (seq(2),))),
        Outcome(FENCE, StepDone(StepId(4), (Drawn(seq(1), 9, 42),), (Honoured(seq(1), 3),), (StageMark(1, 0, 0, 1),))),
        Outcome(FENCE, StepFailed(StepId(4), 0, "NaN in layer 3", (), (Honoured(seq(1), 2),))),
    ],
)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert plain(decode(encode(message))) == plain(message)


def test_whatever_the_api_admits_travels() -> None:
    """The API's ranges and the codec's must agree: a frame that a stage refuses breaks the plan for everyone."""
    from coordinator.api.fields import Fields as Body
    from coordinator.api.schema import read_options
    from coordinator.text.model import SamplingDefaults

    extremes = {
        "seed": (-(2**63), 2**63 - 1, 0),
        "temperature": (0, 2),
        "top_k": (-1, 2**31 - 1),
        "top_p": (0.0, 1.0, 1e-300),
        "min_p": (0.0, 1.0),
        "presence_penalty": (-2, 2),
        "frequency_penalty": (-2, 2),
        "repetition_penalty": (1e-300, 10),
    }
    for field, values in extremes.items():
        for value in values:
            try:
                sampling = read_options(Body({field: value}), SamplingDefaults(), chat=False).sampling
            except RequestError:
                continue  # refused at the door
            row = Row(seq(1), 0, (1,), Draw(sampling, 1))
            decoded = decode(encode(frame((row,))))
            assert isinstance(decoded, Frame), (field, value)


def test_a_long_prefill_travels_as_several_messages_within_the_limit() -> None:
    width = 1024
    boundary = (TensorSpec("hidden", (width,), DType.BF16),)
    row = Row(seq(1), 0, tuple(range(100)) * 15)
    sent = frame((row,), tensors=(hidden(1500, width),))
    messages = encode(sent)
    assert len(messages) == 3
    assert all(len(message) <= GRPC_MESSAGE_BYTES_MAX for message in messages)
    assert plain(decode(messages, expectation(boundary))) == plain(sent)


def test_a_long_prefill_in_eight_bits_takes_half_of_the_messages() -> None:
    width = 1024
    boundary = (TensorSpec("hidden", (width,), DType.BF16),)
    sent = frame((Row(seq(1), 0, (1,) * 1800),), tensors=(), narrow=(narrow(hidden(1800, width)),))
    messages = encode(sent)
    assert len(messages) == 2 and len(encode(replace(sent, tensors=(hidden(1800, width),), narrow=()))) == 4
    assert sum(map(len, messages)) < narrow_bytes((1800, width)) + 10_000
    assert plain(decode(messages, expectation(boundary))) == plain(sent)


def test_what_has_no_fraction_does_not_travel_in_eight_bits() -> None:
    boundary = (TensorSpec("ids", (WIDTH,), DType.U8),)
    sent = frame(ROWS[:1], tensors=(), narrow=(NarrowTensor(DType.U8, (3, WIDTH), bytes(narrow_bytes((3, WIDTH)))),))
    with pytest.raises(WireError, match="eight bits"):
        decode(encode(sent), expectation(boundary))


def test_another_epochs_frame_is_stale() -> None:
    with pytest.raises(StaleFrame):
        Decoder(Expectation(Fence(FENCE.deployment, Epoch(8)), HIDDEN, VOCABULARY)).feed(encode(frame(ROWS))[0])


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (frame(ROWS, tensors=(hidden(3),)), "the plan and its rows say"),
        (frame(ROWS, tensors=(hidden(4, 5),)), "the plan and its rows say"),
        (frame(ROWS, tensors=()), "the plan and its rows say"),
        (frame(ROWS, tensors=(), narrow=(narrow(hidden(4)),)), "the plan and its rows say"),
        (frame(ROWS, tensors=(hidden(3),), narrow=(narrow(hidden(1)),)), "the plan and its rows say"),
        (frame(ROWS, tensors=(hidden(1), hidden(3))), "the plan and its rows say"),
        (frame(ROWS[1:], tensors=(), narrow=(narrow(hidden(1)),)), "the plan and its rows say"),
        (frame((Row(seq(1), 0, (VOCABULARY,)),)), "vocabulary"),
        (frame((Row(seq(1), 0, (1,)), Row(seq(1), 1, (1,)))), "two rows"),
        (frame(tuple(Row(seq(n), 0, (1,)) for n in range(STEP_ROWS_MAX + 1))), "array of at most"),
        (frame((Row(seq(1), 0, (1,) * 2049),)), "lengths"),
        (frame((Row(seq(1), 0, (1,) * 1500), Row(seq(2), 0, (1,) * 1500))), "at most 2048"),
        (frame((Row(seq(1), -1, (1,)),)), "integer"),
    ],
)
def test_what_the_plan_does_not_allow_is_refused(broken: Frame, says: str) -> None:
    with pytest.raises(WireError, match=says):
        decode(encode(broken))


def test_parts_out_of_order_are_refused() -> None:
    width = 1024
    boundary = (TensorSpec("hidden", (width,), DType.BF16),)
    first, second, third = encode(frame((Row(seq(1), 0, (1,) * 1500),), tensors=(hidden(1500, width),)))
    decoder = Decoder(expectation(boundary))
    decoder.feed(first)
    with pytest.raises(WireError, match="out of order"):
        decoder.feed(third)
    with pytest.raises(WireError, match="incomplete"):
        decoder.feed(first)
    del second


def test_a_part_of_the_wrong_length_is_refused() -> None:
    narrowed = frame(ROWS, tensors=(hidden(1),), narrow=(narrow(hidden(3)),))
    with pytest.raises(WireError, match="tensor bytes"):
        Decoder(expectation()).feed(encode(narrowed)[0][:-1])
    message = encode(frame(ROWS))[0]
    with pytest.raises(WireError, match="tensor bytes"):
        Decoder(expectation()).feed(message[:-1])
    with pytest.raises(WireError, match="tensor bytes"):
        Decoder(expectation()).feed(message + b"x")


def test_a_header_longer_than_its_message_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="announced"):
        Decoder(expectation()).feed(struct.pack("<I", 2**31) + b"xy")


def test_another_version_says_which_side_to_update() -> None:
    header = msgpack.packb([999, "f", "d1", 7])
    with pytest.raises(WireError, match="update the older one"):
        Decoder(expectation()).feed(struct.pack("<I", len(header)) + header)


def test_the_payload_limit_leaves_room_for_the_largest_header() -> None:
    rows = tuple(Row(seq(2**61 + n), 2**30, (99,) * 8, ROWS[1].draw) for n in range(STEP_ROWS_MAX))
    assert len(encode(frame(rows))[0]) < GRPC_MESSAGE_BYTES_MAX
    assert FRAME_PAYLOAD_BYTES_MAX < GRPC_MESSAGE_BYTES_MAX


@settings(max_examples=300)
@given(st.data())
def test_damaged_messages_raise_wire_errors_and_nothing_else(data: st.DataObject) -> None:
    wide = frame(ROWS, marks=(StageMark(0, 0.1, 0.2, 0.3),), narrowing=(1, 2))
    narrowed = replace(wide, tensors=(), narrow=(narrow(hidden(4)),))
    message = bytearray(encode(narrowed if data.draw(st.booleans()) else wide)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(message)))
    with contextlib.suppress(WireError):
        Decoder(expectation()).feed(bytes(message[:cut]))


@settings(max_examples=300)
@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
                    lambda inner: st.lists(inner, max_size=6), max_leaves=20))  # fmt: skip
def test_headers_of_any_shape_raise_wire_errors_and_nothing_else(header: object) -> None:
    try:
        packed = msgpack.packb([PROTOCOL_VERSION, "f", FENCE.deployment, FENCE.epoch, header])
    except OverflowError:
        return
    with pytest.raises(WireError):
        Decoder(expectation()).feed(struct.pack("<I", len(packed)) + packed)
