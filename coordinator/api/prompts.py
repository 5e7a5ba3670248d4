"""Turns what a request says into token ids, and checks that prompt and answer fit the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cluster.errors import RequestError
from cluster.limits import CHOICES_MAX
from coordinator.api.schema import Options
from coordinator.text.histories import Conversation, Histories
from coordinator.text.model import TextModel
from coordinator.text.template import ChatMessage
from coordinator.text.tokenizer import Tokenizer

Prompts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """A body that has been understood."""

    options: Options
    prompts: Prompts
    conversation: Conversation | None = None  # of a chat, which may go on after its answer


WINDOW_CHARS: Final = 32_768
"""A text that is probably too long is counted in windows of this size, so that refusing it costs no more than the
context is long, and not what the text is long."""

WINDOW_ERROR_TOKENS: Final = 16
"""Cutting a text between two windows may add this many tokens (a word in parts, a space of its own), and the characters
of one long token that was cut."""

ORDINARY_CHARS_PER_TOKEN: Final = 4
"""Texts of fewer characters for the context's tokens are tokenised at once: counting them first saves little."""


def chat_prompt(
    text: TextModel,
    messages: Sequence[ChatMessage],
    options: Options,
    context_tokens: int,
    histories: Histories,
    client: str,
) -> Conversation:
    """The rendered chat. The template has written the special tokens, so none are added."""
    if text.template is None:
        raise RequestError(
            "this model has no chat template: it continues texts only; use /v1/completions", field="messages"
        )
    rendered = text.template.render(messages)
    _refuse_giant(text.tokenizer, rendered, context_tokens, "messages")
    answer_tokens = max(options.max_tokens or 1, options.min_tokens)
    return histories.begin(text.tokenizer, client, rendered, context_tokens - answer_tokens)


def plain_prompt(text: TextModel, prompt: str | tuple[int, ...], context_tokens: int) -> tuple[int, ...]:
    """A plain text, with the special tokens that the model expects around it; token ids are taken as they are."""
    if not isinstance(prompt, str):
        return prompt
    _refuse_giant(text.tokenizer, prompt, context_tokens, "prompt")
    return text.tokenizer.encode(prompt, add_special_tokens=True)


def _refuse_giant(tokenizer: Tokenizer, text: str, context_tokens: int, field: str) -> None:
    """Refuse a text that surely has more tokens than the context, without tokenising all of it."""
    if len(text) <= max(WINDOW_CHARS, context_tokens * ORDINARY_CHARS_PER_TOKEN):
        return
    at_least, error = 0, WINDOW_ERROR_TOKENS + tokenizer.longest_token_chars
    for begin in range(0, len(text), WINDOW_CHARS):
        at_least += tokenizer.count(text[begin : begin + WINDOW_CHARS]) - error
        if at_least >= context_tokens:
            raise _too_long(context_tokens, f"more than {at_least}", field)


def check_fit(prompts: Prompts, options: Options, context_tokens: int, field: str) -> None:
    """Every prompt and its answer must fit the context; `field` is where the prompt came from."""
    if len(prompts) * options.n > CHOICES_MAX:
        raise RequestError(
            f"{len(prompts)} prompts with n = {options.n} are more than {CHOICES_MAX} choices in one request",
            field="n" if options.n > 1 else field,
        )
    for prompt in prompts:
        if not prompt:
            raise RequestError(f"{field} must have at least one token", field=field, code="invalid_value")
        room = context_tokens - len(prompt)
        if room < 1:
            raise _too_long(context_tokens, str(len(prompt)), field)
        for asked, name in ((options.max_tokens, options.max_tokens_field), (options.min_tokens, "min_tokens")):
            if asked is not None and asked > room:
                message = f"the context has {context_tokens} tokens, the prompt {len(prompt)}, and {name} is {asked}"
                raise RequestError(message, field=name, code="context_length_exceeded")


def _too_long(context_tokens: int, found: str, field: str) -> RequestError:
    message = f"the context has {context_tokens} tokens; the prompt alone has {found}"
    return RequestError(message, field=field, code="context_length_exceeded")
