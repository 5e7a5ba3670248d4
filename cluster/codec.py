"""Frames to bytes and back: a versioned msgpack header, then raw tensor bytes.

One wire message is a little-endian u32 header length, the header, and at most FRAME_PAYLOAD_BYTES_MAX of
payload. A frame whose tensors are longer continues in further messages that carry only its fence and their
number. Everything that arrives is untrusted: a decoder knows what the plan allows and refuses the rest with
WireError before it allocates. Knows nothing of sockets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import msgpack

from cluster import rows_codec
from cluster.errors import StaleFrame, WireError
from cluster.fields import Fields
from cluster.frames import Frame, Hello, Message, Outcome, StreamRole
from cluster.limits import FRAME_HEADER_BYTES_MAX, FRAME_PAYLOAD_BYTES_MAX, PROTOCOL_VERSION
from cluster.narrow_frames import narrow_tokens
from cluster.narrowing import NARROWABLE, NarrowTensor, narrow_bytes
from cluster.plan import Fence
from cluster.steps import Honoured, StageMark, Step, StepFailed
from cluster.types import DeploymentId, DType, Epoch, HostTensor, TensorSpec

_LENGTH = struct.Struct("<I")
_PARTS_MAX = 1 << 16
_TENSORS_MAX = 32  # of a boundary at most 16, with some rows in eight bits twice as many

# One letter for each kind of message; the header's first two fields are always (version, kind).
_HELLO, _FRAME, _PART, _OUTCOME = "h", "f", "p", "o"


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a decoder accepts: frames of one epoch whose tensors look as the plan says."""

    fence: Fence
    boundary: tuple[TensorSpec, ...]  # empty where only token ids arrive
    vocab_size: int


# -- Encoding --------------------------------------------------------------------------------------------


def encode(message: Message) -> list[bytes]:
    """The wire messages of `message`, in order."""
    match message:
        case Hello(fence, stage, role):
            return [_pack([PROTOCOL_VERSION, _HELLO, *_fence_out(fence), stage, role.value])]
        case Outcome(fence, result):
            return [_pack([PROTOCOL_VERSION, _OUTCOME, *_fence_out(fence), rows_codec.result_out(result)])]
        case Frame():
            return _encode_frame(message)


def _encode_frame(frame: Frame) -> list[bytes]:
    step = frame.step
    tensors: tuple[HostTensor | NarrowTensor, ...] = (*frame.tensors, *frame.narrow)
    pieces = list(_payload_pieces(tensors))
    parts = max(1, len(pieces))
    header: list[object] = [
        PROTOCOL_VERSION,
        _FRAME,
        *_fence_out(frame.fence),
        step.id,
        parts,
        [rows_codec.verb_out(verb) for verb in step.verbs],
        rows_codec.rows_out(step.rows),
        [[tensor.dtype.value, list(tensor.shape)] for tensor in tensors],
        rows_codec.honoured_out(frame.honoured),
        [[mark.stage, mark.receive_s, mark.queue_s, mark.compute_s] for mark in frame.marks],
        rows_codec.result_out(frame.failure) if frame.failure else None,
        len(frame.narrow),
        list(frame.narrowing),
    ]
    messages = [_pack(header, *(pieces[0] if pieces else ()))]
    for number, piece in enumerate(pieces[1:], start=1):
        messages.append(_pack([PROTOCOL_VERSION, _PART, *_fence_out(frame.fence), step.id, number], *piece))
    return messages


def _payload_pieces(tensors: Sequence[HostTensor | NarrowTensor]) -> Iterator[list[memoryview]]:
    """Cut the tensors' concatenated bytes into runs of at most FRAME_PAYLOAD_BYTES_MAX, without copying."""
    piece: list[memoryview] = []
    room = FRAME_PAYLOAD_BYTES_MAX
    for tensor in tensors:
        view = memoryview(tensor.data).cast("B")
        while view.nbytes:
            head, view = view[:room], view[room:]
            piece.append(head)
            room -= head.nbytes
            if room == 0:
                yield piece
                piece, room = [], FRAME_PAYLOAD_BYTES_MAX
    if piece:
        yield piece


def _pack(header: list[object], *payload: memoryview) -> bytes:
    packed = msgpack.packb(header)
    if len(packed) > FRAME_HEADER_BYTES_MAX:
        raise WireError(f"a frame header takes {len(packed)} bytes; at most {FRAME_HEADER_BYTES_MAX} may be sent")
    return b"".join((_LENGTH.pack(len(packed)), packed, *payload))


def _fence_out(fence: Fence) -> tuple[str, int]:
    return fence.deployment, fence.epoch


# -- Decoding --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Partial:
    """A frame of which tensors are still arriving."""

    fence: Fence
    step: Step
    honoured: tuple[Honoured, ...]
    marks: tuple[StageMark, ...]
    failure: StepFailed | None
    shapes: list[tuple[DType, tuple[int, ...]]]
    narrow_count: int  # the last of them travel in eight bits
    narrowing: tuple[int, ...]
    parts: int
    data: bytearray
    received: int = 0
    filled_bytes: int = 0

    def frame(self) -> Frame:
        wide: list[HostTensor] = []
        narrow: list[NarrowTensor] = []
        view = memoryview(self.data)
        first_narrow = len(self.shapes) - self.narrow_count
        for number, (dtype, shape) in enumerate(self.shapes):
            is_narrow = number >= first_narrow
            size = _tensor_bytes(dtype, shape, is_narrow)
            data, view = view[:size], view[size:]
            if is_narrow:
                narrow.append(NarrowTensor(dtype, shape, data))
            else:
                wide.append(HostTensor(dtype, shape, data))
        head = (self.fence, self.step, tuple(wide), self.honoured, self.marks, self.failure)
        return Frame(*head, tuple(narrow), self.narrowing)


class Decoder:
    """Turns one stream's wire messages into Messages; keeps the parts of the frame that is arriving."""

    def __init__(self, expectation: Expectation) -> None:
        self._expect = expectation
        self._partial: _Partial | None = None

    def feed(self, message: bytes) -> Message | None:
        """The Message that `message` completes, or None while a frame's parts are still arriving.

        Raises WireError for bytes that break the contract, StaleFrame for another epoch's."""
        header, payload = _unpack(message)
        fields = Fields(header, "frame header")
        version = fields.integer(0, 1 << 16)
        if version != PROTOCOL_VERSION:
            raise WireError(
                f"wire version {version} arrived; this side speaks {PROTOCOL_VERSION}: update the older one"
            )
        kind = fields.text(8)
        fence = Fence(DeploymentId(fields.text(64)), Epoch(fields.integer(0, 1 << 62)))
        if fence != self._expect.fence:
            raise StaleFrame(f"a message of {fence} arrived; this stream belongs to {self._expect.fence}")
        match kind:
            case "h":
                return Hello(fence, fields.integer(0, 1 << 16), _role(fields.text(16)))
            case "o":
                return Outcome(fence, rows_codec.result_in(fields.sub("result")))
            case "f":
                return self._begin(fence, fields, payload)
            case "p":
                return self._continue(fields, payload)
            case _:
                raise WireError(f"unknown message kind {kind!r}")

    def _begin(self, fence: Fence, fields: Fields, payload: memoryview) -> Frame | None:
        if self._partial is not None:
            raise WireError(f"step {self._partial.step.id} is incomplete, but a new frame begins")
        step_id = fields.integer(0, 1 << 62)
        parts = fields.integer(1, _PARTS_MAX)
        step = rows_codec.step_in(step_id, fields, self._expect.vocab_size)
        declared = [_shape_in(item) for item in fields.items("tensors", _TENSORS_MAX)]
        honoured = rows_codec.honoured_in(fields)
        marks = rows_codec.marks_in(fields)
        failure = fields.optional_sub("failure")
        failed = rows_codec.failure_in(failure) if failure is not None else None
        narrow_count, narrowing = fields.integer(0, _TENSORS_MAX), rows_codec.narrowing_in(fields)
        self._check_shapes(step, failed, declared, narrow_count)
        first_narrow = len(declared) - narrow_count
        if not all(dtype in NARROWABLE for dtype, _ in declared[first_narrow:]):
            raise WireError(
                f"step {step_id} announces {declared} in eight bits; only numbers with a fraction have such"
            )
        total = sum(_tensor_bytes(*tensor, number >= first_narrow) for number, tensor in enumerate(declared))
        if parts != max(1, -(-total // FRAME_PAYLOAD_BYTES_MAX)):
            raise WireError(f"{total} tensor bytes do not travel in {parts} parts")
        head = (fence, step, honoured, marks, failed, declared)
        self._partial = _Partial(*head, narrow_count, narrowing, parts, bytearray(total))
        return self._fill(payload)

    def _continue(self, fields: Fields, payload: memoryview) -> Frame | None:
        step_id, number = fields.integer(0, 1 << 62), fields.integer(1, _PARTS_MAX)
        partial = self._partial
        if partial is None or partial.step.id != step_id or partial.received != number:
            raise WireError(f"part {number} of step {step_id} arrived out of order")
        return self._fill(payload)

    def _fill(self, payload: memoryview) -> Frame | None:
        partial = self._partial
        assert partial is not None
        left = len(partial.data) - partial.filled_bytes
        expected = min(left, FRAME_PAYLOAD_BYTES_MAX)
        if payload.nbytes != expected:
            self._partial = None
            raise WireError(f"a part carries {payload.nbytes} tensor bytes; the header announced {expected}")
        partial.data[partial.filled_bytes : partial.filled_bytes + payload.nbytes] = payload
        partial.filled_bytes += payload.nbytes
        partial.received += 1
        if partial.received < partial.parts:
            return None
        self._partial = None
        return partial.frame()

    def _check_shapes(
        self, step: Step, failure: StepFailed | None, declared: list[tuple[DType, tuple[int, ...]]], narrow_count: int
    ) -> None:
        """A computed frame with rows carries exactly the plan's boundary, first of the tokens that travel as computed,
        then of those in eight bits; any other frame carries no tensors."""
        narrow = narrow_tokens(step) if narrow_count else 0
        counts = [tokens for tokens in (step.token_count - narrow, narrow) if tokens]
        specs = self._expect.boundary if failure is None else ()
        expected = [(spec.dtype, (tokens, *spec.shape)) for tokens in counts for spec in specs]
        if declared != expected or narrow_count != (len(specs) if narrow else 0):
            raise WireError(
                f"step {step.id} announces tensors {declared}, the last {narrow_count} of them in eight bits; the plan "
                f"and its rows say {expected}"
            )


def _tensor_bytes(dtype: DType, shape: tuple[int, ...], is_narrow: bool) -> int:
    return narrow_bytes(shape) if is_narrow else prod(shape) * dtype.size_bytes


def _unpack(message: bytes) -> tuple[list[object], memoryview]:
    view = memoryview(message)
    if view.nbytes < _LENGTH.size:
        raise WireError(f"a message of {view.nbytes} bytes is too short for a header")
    (length,) = _LENGTH.unpack_from(view)
    if length > FRAME_HEADER_BYTES_MAX or _LENGTH.size + length > view.nbytes:
        raise WireError(f"a header of {length} bytes is announced in a message of {view.nbytes}")
    try:
        header = msgpack.unpackb(view[_LENGTH.size : _LENGTH.size + length])
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"the frame header is not msgpack: {error}") from error
    if not isinstance(header, list):
        raise WireError(f"the frame header is a {type(header).__name__}, not an array")
    return header, view[_LENGTH.size + length :]


def _role(text: str) -> StreamRole:
    try:
        return StreamRole(text)
    except ValueError as error:
        raise WireError(f"unknown stream role {text!r}") from error


def _shape_in(item: object) -> tuple[DType, tuple[int, ...]]:
    fields = Fields(item, "tensor")
    text = fields.text(16)
    if text not in DType.__members__:
        raise WireError(f"unknown element type {text!r}")
    dims = Fields(fields.items("shape", 8), "shape")
    return DType(text), tuple(dims.integer(0, 1 << 32) for _ in range(len(dims)))
