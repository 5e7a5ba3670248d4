"""coordinator/api/chunks.py: bytes that are put together are the bytes that JSON would have made of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.answer import Delta, Job
from coordinator.api.chat import Chat
from coordinator.api.chunks import ChunkWriter
from coordinator.api.completions import Completions
from coordinator.api.fields import Fields
from coordinator.api.schema import read_options
from coordinator.api.streaming import sse
from coordinator.generation import GenerationRequest, ServedModel
from coordinator.sequence import EndReason
from coordinator.text.histories import Histories
from tests.fake_generator import text_model

TEXT = text_model()
AWKWARD = '"}],"\\ \n 🙂 {"text":"'
"""A model's name that looks like the chunk around it."""

deltas = st.builds(
    Delta,
    choice=st.integers(0, 3),
    text=st.text(st.characters(exclude_categories=["Cs"])),
    tokens=st.lists(st.integers(0, 399), max_size=2).map(tuple),
    end=st.sampled_from([None, None, None, *EndReason]),
)


def job(**asked: object) -> Job:
    options = read_options(Fields({"n": 4, "temperature": 1, **asked}), TEXT.defaults, chat=True)
    request = GenerationRequest("id", ((1, 2),), options.sampling, 4, None, 0, False, frozenset())
    return Job("id-1", 1_700_000_000, ServedModel(AWKWARD, frozenset(), 0, 400, 200, TEXT), options, request, False)


@pytest.mark.parametrize("asked", [{}, {"return_token_ids": True}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize("shape", [Chat(Histories()), Completions()])
def test_every_chunk_is_what_json_makes_of_it(shape: Chat | Completions, asked: dict[str, object]) -> None:
    whole = job(stream=True, **asked)
    pending = {"usage": None} if whole.options.include_usage else {}

    @given(st.lists(deltas, max_size=8))
    def check(many: list[Delta]) -> None:
        writer = ChunkWriter(whole, shape, pending)
        for delta in many:
            assert writer.write(delta) == sse({**shape.chunk(whole, delta), **pending})

    check()
