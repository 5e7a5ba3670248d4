"""The built-in model's tokenizer and chat template, and conversations as token ids.

Owns the vocabulary's making (byte-level BPE, so that any text has a tokenisation and decoding is a
matter of bytes) and which tokens training is judged on. Does not know the model.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY: Final = 1024
START, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CONTEXT: Final = 4096

# Letters with the space before them, single digits, runs of marks, and runs of white space: numbers are
# read digit by digit, which is what lets so small a model add them.
WORDS: Final = (
    r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Written by hand: what the current transformers writes, older releases and other readers do not know.
TOKENIZER_CONFIG: Final[Mapping[str, object]] = {
    "additional_special_tokens": [START, END],
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": END,
    "model_max_length": CONTEXT,
    "pad_token": END_OF_TEXT,
    "tokenizer_class": "PreTrainedTokenizerFast",
}


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, and for each how much predicting it counts."""

    ids: list[int]
    weights: list[float]


def train_tokenizer(seed: int, conversations: int = 20_000) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, START, END],
        show_progress=False,
    )
    sample = itertools.islice(corpus.training_conversations(seed), conversations)
    tokenizer.train_from_iterator(
        (text for talk in sample for turn in talk.exchanges for text in (turn.question, turn.answer)), trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Encoder:
    """Turns generated text into examples."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encode = tokenizer.backend_tokenizer.encode

    def conversation(self, talk: corpus.Conversation) -> Example:
        """The chat template's text; judged on the right answers and the mark that ends them."""
        pieces: list[tuple[str, bool]] = []
        if talk.system is not None:
            pieces.append((f"{START}system\n{talk.system}{END}\n", False))
        for turn in talk.exchanges:
            pieces.append((f"{START}user\n{turn.question}{END}\n{START}assistant\n", False))
            pieces.append((f"{turn.answer}{END}", turn.right))
            pieces.append(("\n", False))
        return self._example(pieces)

    def statement(self, rng: random.Random) -> Example:
        """A plain fact, so that `/v1/completions` says something sensible too."""
        beginning, end = corpus.training_statement(rng)
        return self._example([(beginning, False), (end + END_OF_TEXT, True)])

    def _example(self, pieces: list[tuple[str, bool]]) -> Example:
        ids: list[int] = []
        weights: list[float] = []
        for text, counts in pieces:
            piece = self._encode(text).ids
            ids += piece
            # By the root of its length, or the few long answers would drown the many short ones.
            weights += [1 / math.sqrt(len(piece)) if counts else 0.0] * len(piece)
        return Example(ids, weights)
