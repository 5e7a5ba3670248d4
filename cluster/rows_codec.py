"""The parts of a frame header: rows, cache verbs, marks and results, to msgpack values and back.

Used by `cluster.codec` alone. Whatever comes in is checked against the limits before it is believed.
"""

from __future__ import annotations

import sys
from array import array
from functools import lru_cache
from itertools import chain
from typing import assert_never

import msgpack

from cluster.errors import WireError
from cluster.fields import Fields
from cluster.limits import SEQUENCES_MAX, STEP_ROWS_MAX, STEP_TOKENS_MAX, STEP_VERBS_MAX
from cluster.steps import (
    CacheVerb,
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
from cluster.types import AdapterId, SequenceId, StepId

_POSITION_MAX = 1 << 31
_SEQUENCE_MAX = 1 << 62
_SEED_MAX = 1 << 64
_STAGES_MAX = 1024
_REASON_CHARS_MAX = 2000
_BANNED_MAX = 1024
_DRAW_BYTES_MAX = 8 * _BANNED_MAX  # each banned id takes at most five

assert sys.byteorder == "little", "token ids travel as little-endian int32; every supported machine is little-endian"


def verb_out(verb: CacheVerb) -> list[object]:
    match verb:
        case Fork(src, dst, length):
            return ["f", src, dst, length]
        case Move(src, dst, length):
            return ["m", src, dst, length]
        case Trim(seq, length):
            return ["t", seq, length]
        case Drop(seq):
            return ["d", seq]
        case _:
            assert_never(verb)


def _verb_in(item: object) -> CacheVerb:
    fields = Fields(item, "verb")
    kind = fields.text(1)
    match kind:
        case "f":
            return Fork(_seq(fields), _seq(fields), _position(fields))
        case "m":
            return Move(_seq(fields), _seq(fields), _position(fields))
        case "t":
            return Trim(_seq(fields), _position(fields))
        case "d":
            return Drop(_seq(fields))
        case _:
            raise WireError(f"unknown cache verb {kind!r}")


def rows_out(rows: tuple[Row, ...]) -> list[object]:
    """The rows by columns, so that a stage that serves many sequences reads each column at once."""
    return [
        array("q", [row.seq for row in rows]).tobytes(),
        array("i", [row.start for row in rows]).tobytes(),
        array("i", [len(row.tokens) for row in rows]).tobytes(),
        array("i", chain.from_iterable(row.tokens for row in rows)).tobytes(),
        [_draw_out(row.draw) for row in rows],
        [row.adapter for row in rows] if any(row.adapter is not None for row in rows) else [],
    ]


def _rows_in(fields: Fields, vocab_size: int) -> tuple[Row, ...]:
    seqs = fields.integers("sequences", "q", STEP_ROWS_MAX, 0, _SEQUENCE_MAX)
    starts = fields.integers("starts", "i", STEP_ROWS_MAX, 0, _POSITION_MAX)
    lengths = fields.integers("lengths", "i", STEP_ROWS_MAX, 1, STEP_TOKENS_MAX + 1)
    ids = fields.integers("vocabulary ids", "i", STEP_TOKENS_MAX, 0, vocab_size).tolist()
    draws = fields.items("draws", STEP_ROWS_MAX)
    adapters = fields.items("adapters", STEP_ROWS_MAX) or [None] * len(seqs)
    if not len(seqs) == len(starts) == len(lengths) == len(draws) == len(adapters) or sum(lengths) != len(ids):
        raise WireError("the columns of the rows differ in length")
    if len(set(seqs)) != len(seqs):
        raise WireError("two rows of one sequence in a step")
    rows, at = [], 0
    for seq, start, length, draw, adapter in zip(seqs, starts, lengths, draws, adapters, strict=True):
        rows.append(Row(SequenceId(seq), start, tuple(ids[at : at + length]), _draw_in(draw), _adapter_in(adapter)))
        at += length
    return tuple(rows)


def _adapter_in(item: object) -> AdapterId | None:
    return None if item is None else AdapterId(Fields([item], "adapter").text(128))


def _draw_out(draw: Draw | None) -> bytes | None:
    """A draw travels packed by itself: a sequence's draws are alike from step to step, and are read only once."""
    if draw is None:
        return None
    how = draw.sampling
    values = [
        draw.prompt_tokens,
        list(draw.banned),
        how.seed & (_SEED_MAX - 1),  # the noise counts modulo 2^64
        how.choice,
        how.temperature,
        how.top_k,
        how.top_p,
        how.min_p,
        how.presence_penalty,
        how.frequency_penalty,
        how.repetition_penalty,
    ]
    packed: bytes = msgpack.packb(values)
    return packed


def _draw_in(item: object) -> Draw | None:
    if item is None:
        return None
    if not isinstance(item, bytes) or len(item) > _DRAW_BYTES_MAX:
        raise WireError(f"a draw: expected at most {_DRAW_BYTES_MAX} bytes, found {type(item).__name__}")
    return _read_draw(item)


@lru_cache(maxsize=2 * SEQUENCES_MAX)
def _read_draw(packed: bytes) -> Draw:
    try:
        fields = Fields(msgpack.unpackb(packed), "draw")
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"a draw is not msgpack: {error}") from error
    prompt_tokens = _position(fields)
    banned = Fields(fields.items("banned", _BANNED_MAX), "banned")
    return Draw(
        prompt_tokens=prompt_tokens,
        banned=tuple(_position(banned) for _ in range(len(banned))),
        sampling=Sampling(
            seed=fields.integer(0, _SEED_MAX),
            choice=fields.integer(0, 1 << 16),
            temperature=fields.number(0.0, 100.0),
            top_k=fields.integer(0, _POSITION_MAX),
            top_p=fields.number(0.0, 1.0),
            min_p=fields.number(0.0, 1.0),
            presence_penalty=fields.number(-100.0, 100.0),
            frequency_penalty=fields.number(-100.0, 100.0),
            repetition_penalty=_positive(fields.number(0.0, 1e6)),
        ),
    )


def _positive(value: float) -> float:
    if value <= 0:
        raise WireError("a repetition penalty must be above 0")
    return value


def step_in(step_id: int, fields: Fields, vocab_size: int) -> Step:
    """Reads the verbs and rows of a frame."""
    verbs = tuple(_verb_in(item) for item in fields.items("verbs", STEP_VERBS_MAX))
    return Step(StepId(step_id), verbs, _rows_in(fields.sub("rows"), vocab_size))


def honoured_out(honoured: tuple[Honoured, ...]) -> list[list[int]]:
    return [[item.seq, item.length] for item in honoured]


def honoured_in(fields: Fields) -> tuple[Honoured, ...]:
    found = []
    for item in fields.items("honoured", STEP_VERBS_MAX):
        pair = Fields(item, "honoured")
        found.append(Honoured(_seq(pair), _position(pair)))
    return tuple(found)


def marks_in(fields: Fields) -> tuple[StageMark, ...]:
    found = []
    for item in fields.items("marks", _STAGES_MAX):
        mark = Fields(item, "mark")
        stage = mark.integer(0, _STAGES_MAX)
        found.append(StageMark(stage, mark.number(0, 1e6), mark.number(0, 1e6), mark.number(0, 1e6)))
    return tuple(found)


def narrowing_in(fields: Fields) -> tuple[int, ...]:
    """The stages that send on in eight bits."""
    stages = Fields(fields.items("narrowing", _STAGES_MAX), "narrowing")
    return tuple(stages.integer(0, _STAGES_MAX) for _ in range(len(stages)))


def result_out(result: StepDone | StepFailed) -> list[object]:
    match result:
        case StepDone(step, drawn, honoured, marks):
            return [
                "done",
                step,
                _drawn_out(drawn),
                honoured_out(honoured),
                [[mark.stage, mark.receive_s, mark.queue_s, mark.compute_s] for mark in marks],
            ]
        case StepFailed(step, stage, reason, seqs, honoured):
            return ["failed", step, stage, reason[:_REASON_CHARS_MAX], list(seqs), honoured_out(honoured)]
        case _:
            assert_never(result)


def result_in(fields: Fields) -> StepDone | StepFailed:
    kind = fields.text(8)
    match kind:
        case "done":
            step = StepId(fields.integer(0, 1 << 62))
            return StepDone(step, _drawn_in(fields.sub("drawn")), honoured_in(fields), marks_in(fields))
        case "failed":
            return _failed_in(fields)
        case _:
            raise WireError(f"unknown result {kind!r}")


def failure_in(fields: Fields) -> StepFailed:
    """Reads a failure that rides in a frame."""
    kind = fields.text(8)
    if kind != "failed":
        raise WireError(f"a frame's failure is of kind {kind!r}")
    return _failed_in(fields)


def _failed_in(fields: Fields) -> StepFailed:
    step, stage = StepId(fields.integer(0, 1 << 62)), fields.integer(0, _STAGES_MAX)
    reason = fields.text(_REASON_CHARS_MAX)
    seqs = Fields(fields.items("seqs", max(STEP_ROWS_MAX, SEQUENCES_MAX)), "seqs")
    return StepFailed(step, stage, reason, tuple(_seq(seqs) for _ in range(len(seqs))), honoured_in(fields))


def _drawn_out(drawn: tuple[Drawn, ...]) -> list[bytes]:
    return [
        array("q", [item.seq for item in drawn]).tobytes(),
        array("i", [item.position for item in drawn]).tobytes(),
        array("i", [item.token for item in drawn]).tobytes(),
    ]


def _drawn_in(fields: Fields) -> tuple[Drawn, ...]:
    seqs = fields.integers("sequences", "q", STEP_ROWS_MAX, 0, _SEQUENCE_MAX)
    positions = fields.integers("positions", "i", STEP_ROWS_MAX, 0, _POSITION_MAX)
    tokens = fields.integers("tokens", "i", STEP_ROWS_MAX, 0, _POSITION_MAX)
    if not len(seqs) == len(positions) == len(tokens):
        raise WireError("the columns of the drawn tokens differ in length")
    return tuple(map(Drawn, map(SequenceId, seqs), positions, tokens))


def _seq(fields: Fields) -> SequenceId:
    return SequenceId(fields.integer(0, _SEQUENCE_MAX))


def _position(fields: Fields) -> int:
    return fields.integer(0, _POSITION_MAX)
