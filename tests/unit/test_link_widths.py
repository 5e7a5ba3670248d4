"""coordinator/narrowing.py: which links carry prompts in eight bits."""

from __future__ import annotations

import pytest

from cluster.errors import UsageError
from cluster.limits import FRAME_PAYLOAD_BYTES_MAX
from cluster.narrowing import narrow_bytes
from cluster.steps import Row, StageMark, Step
from cluster.types import DType, SequenceId, StepId, TensorSpec
from coordinator.narrowing import PAYS_BYTES_S, Narrowing, WireBits, read_wire_bits

WIDE = (TensorSpec("hidden", (8192,), DType.BF16),)
TOKENS = 512


def step(*lengths: int) -> Step:
    return Step(StepId(1), (), tuple(Row(SequenceId(n), 0, (1,) * length) for n, length in enumerate(lengths)))


def marks(*rates: float, sent_bytes: int = TOKENS * 16_384) -> tuple[StageMark, ...]:
    """Of stages whose links have these rates; what enters the first stage has no activations."""
    times = [0.0, *((sent_bytes - FRAME_PAYLOAD_BYTES_MAX) / rate for rate in rates)]
    return tuple(StageMark(stage, receive_s, 0.0, 0.1) for stage, receive_s in enumerate(times))


def test_nothing_is_narrow_unless_asked_for() -> None:
    links = Narrowing(WireBits.AS_COMPUTED, WIDE, 3)
    links.note(marks(1e6, 1e6), TOKENS, TOKENS, ())
    assert links.choose(step(TOKENS)) == ()


def test_eight_bits_are_for_every_link_but_not_for_answers() -> None:
    links = Narrowing(WireBits.EIGHT, WIDE, 3)
    assert links.choose(step(TOKENS)) == (0, 1)
    assert links.choose(step(1, 1, 1)) == ()
    assert links.choose(step(1, 2)) == (0, 1), "a prompt beside an answer"
    assert Narrowing(WireBits.EIGHT, WIDE, 1).choose(step(TOKENS)) == ()


def test_measured_links_are_narrow_where_that_pays() -> None:
    links = Narrowing(WireBits.AUTO, WIDE, 3)
    assert links.choose(step(TOKENS)) == (), "nothing was measured"
    links.note(marks(0.5 * PAYS_BYTES_S, 2 * PAYS_BYTES_S), TOKENS, TOKENS, ())
    assert links.choose(step(TOKENS)) == (0,)
    assert [link.bytes_s for link in links.links] == pytest.approx([0.5 * PAYS_BYTES_S, 2 * PAYS_BYTES_S])


def test_a_narrow_frame_measures_the_same_link() -> None:
    links = Narrowing(WireBits.AUTO, WIDE, 2)
    sent_bytes = narrow_bytes((TOKENS, 8192))
    links.note(marks(40e6, sent_bytes=sent_bytes), TOKENS, TOKENS, (0,))
    assert links.links[0].bytes_s == pytest.approx(40e6)


def test_what_has_travelled_in_eight_bits_is_counted() -> None:
    links = Narrowing(WireBits.EIGHT, WIDE, 3)
    links.note(marks(1e6, 1e6), TOKENS, TOKENS - 2, (0, 1))
    links.note(marks(1e6, 1e6), TOKENS, 100, (1,))
    links.note((), TOKENS, TOKENS, (0, 1))  # it failed somewhere
    assert [link.narrow_tokens for link in links.links] == [TOKENS - 2, TOKENS + 98]


def test_a_frame_of_answers_and_prompts_measures_the_same_link() -> None:
    links = Narrowing(WireBits.AUTO, WIDE, 2)
    sent_bytes = narrow_bytes((400, 8192)) + (TOKENS - 400) * 16_384
    links.note(marks(40e6, sent_bytes=sent_bytes), TOKENS, 400, (0,))
    assert links.links[0].bytes_s == pytest.approx(40e6)


def test_one_frame_that_was_held_up_decides_nothing() -> None:
    links = Narrowing(WireBits.AUTO, WIDE, 2)
    for rate in (1e9, 1e9, 1e6, 1e9):
        links.note(marks(rate), TOKENS, TOKENS, ())
    assert links.choose(step(TOKENS)) == ()


def test_frames_of_one_message_and_failed_steps_tell_nothing() -> None:
    links = Narrowing(WireBits.AUTO, WIDE, 2)
    links.note(marks(1e6), 64, 64, ())
    links.note((), TOKENS, TOKENS, ())
    assert links.links[0].bytes_s is None


def test_other_bits_are_refused() -> None:
    assert read_wire_bits(None) is WireBits.AS_COMPUTED
    assert (read_wire_bits("8"), read_wire_bits("auto")) == (WireBits.EIGHT, WireBits.AUTO)
    for text in ("4", "as computed", ""):
        with pytest.raises(UsageError, match="--wire-bits 8 or auto"):
            read_wire_bits(text)
