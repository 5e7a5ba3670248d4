"""Whatever arrives at a node's data streams: the stream ends, everything else goes on."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="the checkpoint is made with transformers: the extra [torch]")

from cluster.codec import encode
from cluster.frames import Frame, Hello, Outcome, StreamRole
from cluster.handshake import greet
from cluster.limits import FRAME_HEADER_BYTES_MAX, GRPC_MESSAGE_BYTES_MAX, PROTOCOL_VERSION
from cluster.plan import Fence
from cluster.steps import Drop, Row, Step, StepDone
from cluster.transport import Credentials, open_stream
from cluster.types import DeploymentId, DType, Epoch, HostTensor, SequenceId, StepId
from tests.integration.hostile import Stage, closes, message

pytestmark = pytest.mark.usefixtures("unharmed")


# -- Before the greeting ---------------------------------------------------------------------------------

_OTHER = Fence(DeploymentId("another"), Epoch(1))

FIRST_MESSAGES: dict[str, Callable[[Stage], bytes]] = {
    "nothing": lambda stage: b"",
    "one byte": lambda stage: b"\x00",
    "noise": lambda stage: bytes(range(256)) * 256,
    "a header longer than the message": lambda stage: struct.pack("<I", 0xFFFFFFFF) + b"x",
    "a header of the largest size": lambda stage: message([0] * (FRAME_HEADER_BYTES_MAX - 8)),
    "a header nested deeply": lambda stage: struct.pack("<I", 100_000) + b"\x91" * 100_000,
    "a map of 4 billion": lambda stage: struct.pack("<I", 5) + b"\xdf\xff\xff\xff\xff",
    "a message beyond gRPC's limit": lambda stage: bytes(GRPC_MESSAGE_BYTES_MAX + 1),
    "another version": lambda stage: message([PROTOCOL_VERSION + 1, "h", "d", 1, 0, "upstream"]),
    "another epoch": lambda stage: encode(
        replace(stage.hello(), fence=replace(stage.fence, epoch=Epoch(stage.fence.epoch + 1)))
    )[0],
    "another deployment": lambda stage: encode(replace(stage.hello(), fence=_OTHER))[0],
    "another stage": lambda stage: encode(replace(stage.hello(), stage=stage.index + 1))[0],
    "an unknown role": lambda stage: message(
        [PROTOCOL_VERSION, "h", stage.fence.deployment, stage.fence.epoch, stage.index, "boss"]
    ),
    "a frame without a greeting": lambda stage: encode(Frame(stage.fence, Step(StepId(1), (), ())))[0],
    "a text as epoch": lambda stage: message([PROTOCOL_VERSION, "h", stage.fence.deployment, "1", 0, "upstream"]),
}


@pytest.mark.parametrize("what", FIRST_MESSAGES)
def test_a_stream_that_begins_wrongly_is_closed(what: str, stages: list[Stage]) -> None:
    for stage in stages:
        assert asyncio.run(closes(stage, [FIRST_MESSAGES[what](stage)], greeting=None))


# -- After the greeting ----------------------------------------------------------------------------------


def _frame(stage: Stage, *, step: int = 1 << 40, parts: object = 1, verbs: object = (), rows: object = None,
           tensors: object = (), narrow: object = 0, narrowing: object = (), fence: Fence | None = None,
           payload: bytes = b"") -> bytes:  # fmt: skip
    """A frame for `stage` with any of its parts replaced."""
    at = fence or stage.fence
    some_row = _columns([1 << 40], struct.pack("<2i", 9, 9), 2)
    return message(
        [PROTOCOL_VERSION, "f", at.deployment, at.epoch, step, parts, verbs, some_row if rows is None else rows,
         tensors, [], [], None, narrow, narrowing],
        payload,
    )  # fmt: skip


def _columns(seqs: list[int], tokens: bytes, length: int, **columns: object) -> list[object]:
    """Rows of these sequences with `length` tokens each, any column replaced."""
    count = len(seqs)
    rows: dict[str, object] = {
        "seqs": struct.pack(f"<{count}q", *seqs),
        "starts": bytes(4 * count),
        "lengths": struct.pack("<i", length) * count,
        "tokens": tokens,
        "draws": [None] * count,
        "adapters": [],
    }
    return [*(rows | columns).values()]


def _row(stage: Stage, tokens: bytes, length: int = 1, **columns: object) -> bytes:
    return _frame(stage, rows=_columns([1 << 40], tokens, length, **columns))


_NINE = struct.pack("<i", 9)
_NO_ROWS = _columns([], b"", 0)


HUGE = 1 << 31
ONE_ROW = Step(StepId(1 << 40), (), (Row(SequenceId(1 << 40), 0, (9, 9)),))

LATER_MESSAGES: dict[str, Callable[[Stage], list[bytes]]] = {
    "noise": lambda stage: [bytes(range(256)) * 256],
    "another epoch's frame": lambda stage: [_frame(stage, fence=replace(stage.fence, epoch=Epoch(10**9)))],
    "a second greeting": lambda stage: encode(stage.hello()),
    "an outcome": lambda stage: encode(Outcome(stage.fence, StepDone(StepId(0), (), (), ()))),
    "a tensor of the wrong shape": lambda stage: encode(
        Frame(stage.fence, ONE_ROW, (HostTensor(DType.F32, (2, 3), bytes(24)),))
    ),
    "a tensor of the wrong type": lambda stage: encode(
        Frame(stage.fence, ONE_ROW, (HostTensor(DType.F16, (2, 64), bytes(256)),))
    ),
    "a tensor of 512 GiB": lambda stage: [_frame(stage, parts=524_288 >> 4, tensors=[["F32", [HUGE, 64]]])],
    "too many parts": lambda stage: [_frame(stage, parts=60_000, tensors=[["F32", [2, 64]]])],
    "a payload that is too short": lambda stage: [_frame(stage, tensors=[["F32", [2, 64]]], payload=bytes(100))],
    "eight bits of the wrong length": lambda stage: [
        _frame(stage, tensors=[["F32", [2, 64]]], narrow=1, payload=bytes(512))
    ],
    "eight bits by half": lambda stage: [_frame(stage, rows=_NO_ROWS, narrow=0.5)],
    "a stage before the first that narrows": lambda stage: [_frame(stage, rows=_NO_ROWS, narrowing=[-1])],
    "a payload that nobody announced": lambda stage: [_frame(stage, rows=_NO_ROWS, payload=bytes(100))],
    "the second part of nothing": lambda stage: [
        message([PROTOCOL_VERSION, "p", stage.fence.deployment, stage.fence.epoch, 7, 1], bytes(10))
    ],
    "a token outside the vocabulary": lambda stage: [_row(stage, struct.pack("<i", 1 << 30))],
    "a negative token": lambda stage: [_row(stage, struct.pack("<i", -1))],
    "half a token": lambda stage: [_row(stage, b"\x01\x00\x00")],
    "a row without tokens": lambda stage: [_row(stage, b"", 0)],
    "a row of minus one token": lambda stage: [_row(stage, b"", -1)],
    "3,000 tokens": lambda stage: [_row(stage, _NINE * 3000, 3000)],
    "more tokens than the rows hold": lambda stage: [_row(stage, _NINE * 3)],
    "fewer tokens than the rows hold": lambda stage: [_row(stage, _NINE, 2)],
    "a negative start": lambda stage: [_row(stage, _NINE, starts=struct.pack("<i", -1))],
    "more starts than rows": lambda stage: [_row(stage, _NINE, starts=bytes(8))],
    "fewer draws than rows": lambda stage: [_row(stage, _NINE, draws=[])],
    "a draw that is no draw": lambda stage: [_row(stage, _NINE, draws=[b"\xc1"])],
    "a draw of a megabyte": lambda stage: [_row(stage, _NINE, draws=[bytes(1 << 20)])],
    "more adapters than rows": lambda stage: [_row(stage, _NINE, adapters=[None, None])],
    "a number as adapter": lambda stage: [_row(stage, _NINE, adapters=[5])],
    "two rows of one sequence": lambda stage: [_frame(stage, rows=_columns([5, 5], _NINE * 2, 1))],
    "100,000 verbs": lambda stage: [_frame(stage, verbs=[["d", 1]] * 50_000, rows=_NO_ROWS)],
    "an unknown verb": lambda stage: [_frame(stage, verbs=[["x", 1]], rows=_NO_ROWS)],
    "fields missing": lambda stage: [message([PROTOCOL_VERSION, "f", stage.fence.deployment, stage.fence.epoch, 1])],
}


@pytest.mark.parametrize("what", LATER_MESSAGES)
def test_a_stream_that_breaks_the_contract_is_closed(what: str, stages: list[Stage]) -> None:
    for stage in stages:
        assert asyncio.run(closes(stage, LATER_MESSAGES[what](stage), greeting=stage.hello()))


def test_nobody_else_may_take_the_results(stages: list[Stage]) -> None:
    for stage in stages:
        assert asyncio.run(closes(stage, [], greeting=Hello(stage.fence, stage.index, StreamRole.RESULTS)))


def test_a_hundred_streams_that_say_nothing_change_nothing(stages: list[Stage]) -> None:
    async def open_many() -> None:
        streams = [open_stream(Credentials(), stage.address) for stage in stages for _ in range(33)]
        await asyncio.sleep(1.0)
        await asyncio.gather(*(stream.close() for stream in streams))

    asyncio.run(open_many())


def test_a_drop_of_an_unknown_sequence_is_no_error(stages: list[Stage]) -> None:
    """Cancels may cross: a well-formed frame is served, and the pipeline goes on."""
    frame = encode(Frame(stages[0].fence, Step(StepId(1 << 41), (Drop(SequenceId(1 << 41)),), ())))

    async def send() -> None:
        stream = open_stream(Credentials(), stages[0].address)
        await greet(stream, stages[0].hello())
        for part in frame:
            await stream.write(part)
        await asyncio.sleep(0.5)
        await stream.close()

    asyncio.run(send())
