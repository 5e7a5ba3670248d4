"""The parts of a frame header: rows, cache verbs, marks and results, to msgpack values and back.

Used by `cluster.codec` alone. Whatever comes in is checked against the limits before it is believed.
"""

from __future__ import annotations

import sys
from array import array
from typing import assert_never

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


def row_out(row: Row) -> list[object]:
    return [row.seq, row.start, array("i", row.tokens).tobytes(), _draw_out(row.draw), row.adapter]


def _row_in(item: object, vocab_size: int) -> Row:
    fields = Fields(item, "row")
    seq, start = _seq(fields), _position(fields)
    packed = fields.data(STEP_TOKENS_MAX * 4)
    if not packed or len(packed) % 4:
        raise WireError(f"a row's token ids take {len(packed)} bytes, which is no positive multiple of 4")
    ids = array("i")
    ids.frombytes(packed)
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise WireError(f"a row holds a token id outside the vocabulary of {vocab_size}")
    draw = fields.optional_sub("draw")
    adapter = fields.optional_text(128)
    return Row(
        seq,
        start,
        tuple(ids),
        _draw_in(draw) if draw is not None else None,
        AdapterId(adapter) if adapter is not None else None,
    )


def _draw_out(draw: Draw | None) -> list[object] | None:
    if draw is None:
        return None
    how = draw.sampling
    return [
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


def _draw_in(fields: Fields) -> Draw:
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
    rows = tuple(_row_in(item, vocab_size) for item in fields.items("rows", STEP_ROWS_MAX))
    step = Step(StepId(step_id), verbs, rows)
    if step.token_count > STEP_TOKENS_MAX:
        raise WireError(f"step {step_id} holds {step.token_count} tokens; at most {STEP_TOKENS_MAX} are allowed")
    if len({row.seq for row in rows}) != len(rows):
        raise WireError(f"step {step_id} holds two rows of one sequence")
    return step


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


def result_out(result: StepDone | StepFailed) -> list[object]:
    match result:
        case StepDone(step, drawn, honoured, marks):
            return [
                "done",
                step,
                [[item.seq, item.position, item.token] for item in drawn],
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
            drawn = tuple(_drawn_in(item) for item in fields.items("drawn", STEP_ROWS_MAX))
            return StepDone(step, drawn, honoured_in(fields), marks_in(fields))
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


def _drawn_in(item: object) -> Drawn:
    fields = Fields(item, "drawn")
    return Drawn(_seq(fields), _position(fields), fields.integer(0, _POSITION_MAX))


def _seq(fields: Fields) -> SequenceId:
    return SequenceId(fields.integer(0, _SEQUENCE_MAX))


def _position(fields: Fields) -> int:
    return fields.integer(0, _POSITION_MAX)
