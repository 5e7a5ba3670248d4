"""coordinator/service.py: requests over the real API, scheduler and serving loop, in front of stages that answer at
once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, cast

import httpx
import pytest

from cluster.errors import RequestError
from cluster.limits import QUEUED_REQUESTS_MAX
from cluster.steps import Drawn, Sampling, Step, StepDone
from coordinator.admission import Room
from coordinator.api.app import create_app
from coordinator.deadlines import Deadlines
from coordinator.generation import GenerationRequest, ServedModel
from coordinator.lanes import Lane
from coordinator.pipeline import Pipeline, TimedOutcome
from coordinator.promises import ANSWER_TOKENS_FIRST, ANSWERS_BELIEVED
from coordinator.sequence import SequenceAsk
from coordinator.service import InferenceService
from coordinator.serving import Listener, Serving
from coordinator.unread import Unread
from tests.fake_generator import text_model

CONTEXT = 4096
SAID = "hello world, stop here. "


class PromptPipeline:
    """Says SAID over and over. Who has drawn `silent_after` tokens gets none until `go_on`."""

    def __init__(self, said: Sequence[int]) -> None:
        self._said = said
        self._steps: asyncio.Queue[Step] = asyncio.Queue()
        self._going = asyncio.Event()
        self.silent_after: int | None = None
        self.silent = asyncio.Event()  # somebody waits for a token that does not come

    def go_on(self) -> None:
        self.silent_after = None
        self.silent.clear()
        self._going.set()

    def send(self, step: Step) -> None:
        self._steps.put_nowait(step)

    async def run(self, on_outcome: Callable[[TimedOutcome], None]) -> None:
        while True:
            await asyncio.sleep(0)  # so that whoever reads keeps up
            step = await self._steps.get()
            places = {row.seq: (row.end, row.end - row.draw.prompt_tokens) for row in step.rows if row.draw is not None}
            if self.silent_after in {place for _, place in places.values()}:
                self._going.clear()
                self.silent.set()
                await self._going.wait()
            drawn = tuple(Drawn(seq, end, self._said[place % len(self._said)]) for seq, (end, place) in places.items())
            on_outcome(TimedOutcome(StepDone(step.id, drawn, (), ()), 0.001, len(step.rows), step.token_count))

    async def close(self) -> None:
        return


class Endpoint:
    def __init__(
        self, pipeline: PromptPipeline, serving: Serving, service: InferenceService, client: httpx.AsyncClient
    ) -> None:
        self.pipeline, self.serving, self.service, self._client = pipeline, serving, service, client

    async def complete(self, *, key: str = "", **fields: object) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return await self._client.post("/v1/completions", json={"prompt": [5, 6, 7], **fields}, headers=headers)

    async def chat(self, **fields: object) -> Any:
        """The answer to a chat without max_tokens."""
        body = {"messages": [{"role": "user", "content": "x"}], **fields}
        return (await self._client.post("/v1/chat/completions", json=body)).json()

    @property
    def reserved(self) -> int:
        return self.serving.load[2]


@contextlib.asynccontextmanager
async def endpoint(deadlines: Deadlines | None = None) -> AsyncIterator[Endpoint]:
    text = text_model()
    pipeline = PromptPipeline(text.tokenizer.encode(SAID, add_special_tokens=False))
    serving = Serving(cast(Pipeline, pipeline), Room(1, 8 * CONTEXT, CONTEXT), prefix_cache=False)
    service = InferenceService(dict, deadlines or Deadlines())
    service.set_model(ServedModel("model", frozenset(), 0, 400, None, text))
    service.begin(serving)
    running = asyncio.create_task(serving.run())
    transport = httpx.ASGITransport(app=create_app(service))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            yield Endpoint(pipeline, serving, service, client)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def given_up(it: Endpoint, after_tokens: int) -> int:
    """A client leaves; tells how much had been reserved for it."""
    it.pipeline.silent_after = after_tokens
    asking = asyncio.create_task(it.chat())
    await it.pipeline.silent.wait()
    reserved = it.reserved
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert it.reserved == 0
    it.pipeline.go_on()
    return reserved


def test_answers_that_a_stop_string_ends_teach_how_long_answers_are() -> None:
    async def scenario() -> tuple[int, int]:
        async with endpoint() as it:
            for _ in range(ANSWERS_BELIEVED):
                answer = await it.chat(stop="stop", temperature=0)
                assert answer["choices"][0]["message"]["content"] == "hello world, "
            tokens = answer["usage"]["completion_tokens"]
            return await given_up(it, 0) - answer["usage"]["prompt_tokens"], tokens

    found, tokens = asyncio.run(scenario())
    assert found == tokens < ANSWER_TOKENS_FIRST


def test_answers_that_their_clients_gave_up_teach_nothing() -> None:
    async def scenario() -> list[int]:
        async with endpoint() as it:
            return [await given_up(it, 5) for _ in range(ANSWERS_BELIEVED + 1)]

    first, *_, last = asyncio.run(scenario())
    assert first == last > ANSWER_TOKENS_FIRST


@pytest.mark.parametrize(
    ("field", "code", "silent_after"),
    [
        ("timeout", "total_timeout", 3),
        ("first_token_timeout", "first_token_timeout", 0),
        ("token_timeout", "token_timeout", 3),
    ],
)
def test_a_requests_own_limit_is_a_408_that_names_its_field(field: str, code: str, silent_after: int) -> None:
    async def scenario() -> httpx.Response:
        async with endpoint() as it:
            it.pipeline.silent_after = silent_after
            return await it.complete(max_tokens=10, **{field: 0.2})

    response = asyncio.run(scenario())
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (408, code, field)
    assert response.headers["x-should-retry"] == "false", "official clients would have all of it computed again"
    assert field in error["message"] and "0.2 s" in error["message"]


@pytest.mark.parametrize(
    ("deadlines", "code", "silent_after"),
    [
        (Deadlines(first_token_s=0.2), "first_token_timeout", 0),
        (Deadlines(between_tokens_s=0.2), "token_timeout", 3),
    ],
)
def test_a_limit_of_the_servers_is_a_504(deadlines: Deadlines, code: str, silent_after: int) -> None:
    async def scenario() -> httpx.Response:
        async with endpoint(deadlines) as it:
            it.pipeline.silent_after = silent_after
            return await it.complete(max_tokens=10, token_timeout=3600)

    response = asyncio.run(scenario())
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (504, code, None)


def test_choices_after_the_first_may_wait_for_its_room() -> None:
    """Nine choices where eight have room: the ninth waits longer than a request may wait for its first."""

    async def scenario() -> httpx.Response:
        async with endpoint(Deadlines(queue_s=0.2)) as it:
            it.pipeline.silent_after = 2
            asking = asyncio.create_task(it.complete(n=9, max_tokens=CONTEXT - 3, stop="stop", temperature=0))
            await it.pipeline.silent.wait()
            await asyncio.sleep(0.5)
            it.pipeline.go_on()
            return await asking

    response = asyncio.run(scenario())
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"]) == 9


@pytest.mark.parametrize(("priority", "status"), [("interactive", 504), ("batch", 200)])
def test_batch_work_is_not_held_to_the_deadlines_of_people(priority: str, status: int) -> None:
    async def scenario() -> httpx.Response:
        async with endpoint(Deadlines(first_token_s=0.2)) as it:
            it.pipeline.silent_after = 0
            asking = asyncio.create_task(it.complete(max_tokens=4, priority=priority))
            await it.pipeline.silent.wait()
            await asyncio.sleep(0.5)
            it.pipeline.go_on()
            return await asking

    assert asyncio.run(scenario()).status_code == status


def test_what_a_request_says_of_itself_reaches_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lane, whose turn it takes, and with whom it shares what prompts have left in the caches."""
    asks: list[SequenceAsk] = []

    async def scenario() -> None:
        async with endpoint() as it:
            submit = it.serving.submit

            def noted(some: Sequence[SequenceAsk], listener: Listener) -> None:
                asks.extend(some)
                submit(some, listener)

            monkeypatch.setattr(it.serving, "submit", noted)
            for key, fields in (("", {}), ("", {"service_tier": "flex"}), ("one", {"priority": "batch"}), ("two", {})):
                answer = await it.complete(key=key, max_tokens=2, **fields)
                assert answer.status_code == 200

    asyncio.run(scenario())
    nobody, flex, one, two = asks
    assert [ask.lane for ask in asks] == [Lane.INTERACTIVE, Lane.BATCH, Lane.BATCH, Lane.INTERACTIVE]
    assert nobody.salt == flex.salt == "" and nobody.client == flex.client
    assert len({ask.salt for ask in (nobody, one, two)}) == len({ask.client for ask in (nobody, one, two)}) == 3


def test_who_reads_no_further_loses_the_answer_and_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.service.Unread", partial(Unread, events_max=8))
    eos_ids: frozenset[int] = frozenset()
    asked = GenerationRequest("x", ((5, 6, 7),), Sampling(seed=0), 1, 1000, 0, True, eos_ids)

    async def scenario() -> None:
        async with endpoint() as it:
            it.pipeline.silent_after = 50  # so that it does not come to its end meanwhile
            events = it.service.submit(asked)
            await anext(events)
            async with asyncio.timeout(30):
                while it.reserved:  # noqa: ASYNC110 - nobody says when it is given up
                    await asyncio.sleep(0)
            with pytest.raises(RequestError, match="given up"):
                await anext(events)

    asyncio.run(scenario())


def test_who_is_displaced_from_a_full_queue_hears_when_to_come_back() -> None:
    """One client fills the queue behind its first request; another one's takes the place of its newest."""

    async def scenario() -> tuple[httpx.Response, httpx.Response, set[int]]:
        async with endpoint() as it:
            it.pipeline.silent_after = 0
            asking = (it.complete(key="flood", max_tokens=4) for _ in range(1 + QUEUED_REQUESTS_MAX))
            flood = [asyncio.create_task(each) for each in asking]
            while it.serving.load[:2] != (QUEUED_REQUESTS_MAX, 1):  # noqa: ASYNC110 - nobody says when all wait
                await asyncio.sleep(0)
            other = asyncio.create_task(it.complete(key="other", max_tokens=4))
            (displaced,), waiting = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
            it.pipeline.go_on()
            answers = await asyncio.gather(*waiting)
            return await displaced, await other, {answer.status_code for answer in answers}

    displaced, other, others = asyncio.run(scenario())
    assert other.status_code == 200 and others == {200}
    assert (displaced.status_code, displaced.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(displaced.headers["retry-after"]) >= 1
