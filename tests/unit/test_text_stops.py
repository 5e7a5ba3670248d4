"""coordinator/text/stops.py: a stop string ends the text and no part of it is ever shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.text.stops import StopMatcher


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first stop string to be complete, the longest of those that end together."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(
    parts=st.lists(st.text(alphabet="ab", max_size=6), max_size=8),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4),
)
def test_agrees_with_the_naive_search_however_the_text_is_cut(parts: list[str], stops: list[str]) -> None:
    matcher, seen, stopped, so_far = StopMatcher(stops), "", False, ""
    for part in parts:
        so_far += part
        shown, stopped = matcher.push(part)
        seen += shown
        # What has been shown never needs to be taken back, and nothing is held back without need.
        assert reference(so_far, stops)[0].startswith(seen)
        if stopped:
            break
        could_begin = max((n for s in stops for n in range(len(s)) if so_far.endswith(s[:n])), default=0)
        assert len(so_far) - len(seen) == could_begin
    if not stopped:
        seen += matcher.flush()
    assert (seen, stopped) == reference("".join(parts), stops)


def test_a_stop_string_across_pieces_is_never_half_shown() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Hi\n") == ("Hi", False)
    assert matcher.push("\nUs") == ("", False)
    assert matcher.push("er: x") == ("", True)


def test_held_text_comes_out_when_it_turns_out_otherwise() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("a ST") == ("a ", False)
    assert matcher.push("ART") == ("START", False)
    assert matcher.flush() == ""


def test_held_text_comes_out_at_the_end() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("a STO") == ("a ", False)
    assert matcher.flush() == "STO"
    assert matcher.flush() == ""


@pytest.mark.parametrize("text", ["", "anything"])
def test_without_stop_strings_everything_passes(text: str) -> None:
    assert StopMatcher([]).push(text) == (text, False)
