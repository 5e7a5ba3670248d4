"""POST /v1/chat/completions: messages in, an assistant's message out."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.api.answer import Delta, Job
from coordinator.api.fields import Fields
from coordinator.api.messages import read_messages
from coordinator.api.prompts import Asked, chat_prompt
from coordinator.api.responding import Whole
from coordinator.api.schema import read_options
from coordinator.api.streaming import Object
from coordinator.generation import ServedModel
from coordinator.lanes import Lane
from coordinator.text.histories import Histories


class Chat:
    """How chats are read and written."""

    path = "/v1/chat/completions"
    prompt_field = "messages"
    id_prefix = "chatcmpl-"
    continues = False

    def __init__(self, histories: Histories) -> None:
        self._histories = histories

    def read(self, body: object, model: ServedModel, context_tokens: int, client: str) -> Asked:
        fields = Fields(body)
        messages = read_messages(fields)
        options = read_options(fields, model.text.defaults, chat=True)
        model.check_name(options.model)
        conversation = chat_prompt(model.text, messages, options, context_tokens, self._histories, client)
        live = options.lane is Lane.INTERACTIVE  # a program's pile would displace the chats that people are in
        return Asked(options, (conversation.ids,), conversation if live else None)

    def whole(self, job: Job, choices: list[Whole]) -> Object:
        prompt = {"prompt_token_ids": job.prompt_of(0)} if job.options.return_token_ids else {}
        written = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                "logprobs": None,
                "finish_reason": choice.end,
                **_token_ids(job, tuple(choice.tokens)),
            }
            for index, choice in enumerate(choices)
        ]
        return {**_head(job, "chat.completion"), **prompt, "choices": written}

    def opening(self, job: Job) -> Iterator[Object]:
        """Each choice begins by saying whose message it is."""
        for index in range(job.choice_count):
            prompt = {"prompt_token_ids": job.prompt_of(0)} if job.options.return_token_ids and index == 0 else {}
            yield {**self._chunk(job, index, {"role": "assistant", "content": ""}, ()), **prompt}

    def chunk(self, job: Job, delta: Delta) -> Object:
        content = {"content": delta.text} if delta.end is None or delta.text else {}
        return self._chunk(job, delta.choice, content, delta.tokens, delta.end)

    def closing(self, job: Job) -> Object:
        return {**_head(job, "chat.completion.chunk"), "choices": []}

    def _chunk(
        self, job: Job, index: int, delta: Object, tokens: tuple[int, ...], end: str | None = None
    ) -> dict[str, object]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": end, **_token_ids(job, tokens)}
        return {**_head(job, "chat.completion.chunk"), "choices": [choice]}


def _head(job: Job, kind: str) -> dict[str, object]:
    return {"id": job.id, "object": kind, "created": job.created_s, "model": job.model.name}


def _token_ids(job: Job, tokens: tuple[int, ...]) -> dict[str, object]:
    return {"token_ids": tokens} if job.options.return_token_ids else {}
