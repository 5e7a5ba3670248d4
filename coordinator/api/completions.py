"""POST /v1/completions: texts or token ids in, their continuations out."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.api.answer import Delta, Job
from coordinator.api.fields import Fields
from coordinator.api.prompts import Asked, plain_prompt
from coordinator.api.responding import Whole
from coordinator.api.schema import read_options, read_prompts
from coordinator.api.streaming import Object
from coordinator.generation import ServedModel


class Completions:
    """How completions are read and written. A whole answer and a chunk have the same shape."""

    path = "/v1/completions"
    prompt_field = "prompt"
    id_prefix = "cmpl-"
    continues = True

    def read(self, body: object, model: ServedModel, context_tokens: int, client: str) -> Asked:
        fields = Fields(body)
        prompts = read_prompts(fields, model.vocab_size)
        options = read_options(fields, model.text.defaults, chat=False)
        model.check_name(options.model)
        return Asked(options, tuple(plain_prompt(model.text, prompt, context_tokens) for prompt in prompts))

    def whole(self, job: Job, choices: list[Whole]) -> Object:
        written = [
            self._choice(job, index, "".join(choice.text), tuple(choice.tokens), choice.end) | self._prompt(job, index)
            for index, choice in enumerate(choices)
        ]
        return {**self._head(job), "choices": written}

    def opening(self, job: Job) -> Iterator[Object]:
        """Nothing, unless the client wants to know its prompts' token ids."""
        if job.options.return_token_ids:
            for index in range(job.choice_count):
                choice = self._choice(job, index, "", ()) | self._prompt(job, index)
                yield {**self._head(job), "choices": [choice]}

    def chunk(self, job: Job, delta: Delta) -> Object:
        return {**self._head(job), "choices": [self._choice(job, delta.choice, delta.text, delta.tokens, delta.end)]}

    def closing(self, job: Job) -> Object:
        return {**self._head(job), "choices": []}

    def _head(self, job: Job) -> dict[str, object]:
        return {"id": job.id, "object": "text_completion", "created": job.created_s, "model": job.model.name}

    def _choice(
        self, job: Job, index: int, text: str, tokens: tuple[int, ...], end: str | None = None
    ) -> dict[str, object]:
        ids = {"token_ids": tokens} if job.options.return_token_ids else {}
        return {"index": index, "text": text, "logprobs": None, "finish_reason": end, **ids}

    def _prompt(self, job: Job, index: int) -> dict[str, object]:
        return {"prompt_token_ids": job.prompt_of(index)} if job.options.return_token_ids else {}
