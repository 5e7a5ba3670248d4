"""The text that the built-in model is trained on and tested with, all of it generated here.

Owns how questions are decorated (case, "please", lost marks, typing slips), how they are joined into
conversations, and the held-out questions. A held-out question uses a phrasing that no training
conversation contains in any form. Does not know tokens: train.py does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import facts
import phrasings
import unknowns

# How often each meaning is asked, and the weight of every meaning not listed.
WEIGHTS: Final = {"capital": 24.0, "sum": 26.0, "colour": 14.0, "mix": 6.0, "count": 2.5, "unknown": 18.0}
PLAIN_MEANING_WEIGHT: Final = 1.6
# Small talk takes no "please" and no "hi," before it.
SMALL_TALK: Final = frozenset(
    {"hello", "good_morning", "good_afternoon", "good_evening", "good_night"}
    | {"how_are_you", "thanks", "bye", "praise", "sorry"}
)

FAMILIAR_SHARE: Final = 0.15
AFFIX_SHARE: Final = 0.3
PLAIN_SURFACE_SHARE: Final = 0.45
SLIP_SHARE: Final = 0.06
SYSTEM_SHARE: Final = 0.25
LONG_SHARE: Final = 0.03
FOREIGN_ANSWER_SHARE: Final = 0.08

SYSTEM_MESSAGES: Final = (
    "You are a helpful assistant.",
    "You are Potluck, a helpful assistant.",
    "You are a friendly chatbot.",
    "Answer briefly.",
    "Be polite and concise.",
    "You are an AI that answers questions. Keep your answers short and truthful.",
    "Answer the user's question in one sentence.",
)
PREFIXES: Final = (
    "please", "hey,", "hi,", "hello,", "ok,", "so,", "now", "potluck,", "and", "hi!", "hello.", "thanks,"
)  # fmt: skip
SUFFIXES: Final = ("please", ", please", ", thanks", "now", ", potluck", "for me", "again")
QUESTION_WORDS: Final = frozenset(
    {"what", "what's", "which", "who", "how", "where", "when", "why"}
    | {"is", "are", "can", "could", "do", "does", "if", "will"}
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and what was answered; `right` unless the answer stands for another speaker's words."""

    question: str
    answer: str
    right: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then exchanges."""

    system: str | None
    exchanges: tuple[Exchange, ...]


class Questions:
    """Draws exchanges from one side of the split: what training sees, or what is held out to test it."""

    def __init__(self, *, held_out: bool) -> None:
        table = phrasings.phrasings()
        self._held_out = held_out
        self._templates = {
            meaning: templates
            for meaning, known in table.items()
            if (templates := [phrasing.template for phrasing in known if phrasing.held_out == held_out])
        }
        self._familiar = {
            meaning: [template for template in templates if phrasings.words(template) in phrasings.ALWAYS_TRAINED]
            for meaning, templates in self._templates.items()
        }
        self._kept_back = {
            phrasings.words(phrasing.template) for known in table.values() for phrasing in known if phrasing.held_out
        }
        self._meanings = [*self._templates, "unknown"]
        self._weights = [WEIGHTS.get(meaning, PLAIN_MEANING_WEIGHT) for meaning in self._meanings]

    def draw(self, rng: random.Random) -> Exchange:
        meaning = rng.choices(self._meanings, self._weights)[0]
        if meaning == "unknown":
            unknown = unknowns.unknown_question(rng, held_out=self._held_out)
            question, answer = self._affixed(rng, meaning, unknown), facts.ANSWERS[meaning]
        else:
            slots, answer = _fact(rng, meaning)
            question = self._affixed(rng, meaning, self._template(rng, meaning)).format(**slots)
        return Exchange(_surface(rng, question, slips=not self._held_out), answer)

    def _template(self, rng: random.Random, meaning: str) -> str:
        """Any template of the meaning, the ones that newcomers use most a little more often."""
        familiar = self._familiar[meaning]
        if familiar and rng.random() < FAMILIAR_SHARE:
            return rng.choice(familiar)
        return rng.choice(self._templates[meaning])

    def _affixed(self, rng: random.Random, meaning: str, template: str) -> str:
        if meaning in SMALL_TALK or rng.random() >= AFFIX_SHARE:
            return template
        affixed = f"{rng.choice(PREFIXES)} {template}" if rng.random() < 0.6 else f"{template} {rng.choice(SUFFIXES)}"
        # "please" before "tell me" may spell a phrasing that is kept back.
        return template if not self._held_out and phrasings.words(affixed) in self._kept_back else affixed


def training_conversations(seed: int) -> Iterator[Conversation]:
    """Endless training conversations; the same seed yields the same ones."""
    rng = random.Random(f"train {seed}")  # noqa: S311 - practice text, no secret
    questions = Questions(held_out=False)
    while True:
        turns = rng.randint(6, 18) if rng.random() < LONG_SHARE else rng.choices((1, 2, 3, 4), (50, 25, 17, 8))[0]
        exchanges = [questions.draw(rng) for _ in range(turns)]
        for index in range(turns - 1):
            if rng.random() < FOREIGN_ANSWER_SHARE:
                exchanges[index] = _with_foreign_answer(rng, exchanges[index])
        yield Conversation(_system(rng), tuple(exchanges))


def training_statement(rng: random.Random) -> tuple[str, str]:
    """A fact as plain text without a chat: its beginning, and the end that follows from it."""
    while True:
        meaning = rng.choices(("capital", "colour", "mix", "sum"), (40, 25, 10, 25))[0]
        _, answer = _fact(rng, meaning)
        beginning, link, end = re.split(r"( is| are| make| =)(?= )", answer, maxsplit=1)
        return beginning + link, end


def held_out_conversations(seed: int, count: int) -> list[Conversation]:
    """Test conversations of one to three exchanges, all of them in phrasings that training never sees."""
    rng = random.Random(f"test {seed}")  # noqa: S311 - practice text, no secret
    questions = Questions(held_out=True)
    return [
        Conversation(_system(rng), tuple(questions.draw(rng) for _ in range(rng.choice((1, 1, 2, 3)))))
        for _ in range(count)
    ]


def _system(rng: random.Random) -> str | None:
    return rng.choice(SYSTEM_MESSAGES) if rng.random() < SYSTEM_SHARE else None


def _with_foreign_answer(rng: random.Random, exchange: Exchange) -> Exchange:
    """A history may hold an answer cut short by a limit, or words that were never the model's."""
    if rng.random() < 0.5:
        cut = rng.randint(1, len(exchange.answer))
        return Exchange(exchange.question, exchange.answer[:cut], right=False)
    said = " ".join(unknowns.invented_word(rng) for _ in range(rng.randint(1, 8)))
    return Exchange(exchange.question, said.capitalize() + ".", right=False)


def _fact(rng: random.Random, meaning: str) -> tuple[dict[str, str], str]:
    """Values for the slots of a meaning's templates, and the answer that belongs to them."""
    match meaning:
        case "capital":
            country = rng.choice([*facts.CAPITALS, *facts.COUNTRY_ALIASES])
            answer = facts.capital_answer(facts.COUNTRY_ALIASES.get(country, country))
            return {"country": _article_dropped(rng, country)}, answer
        case "sum":
            first, second = rng.randint(0, facts.SUM_LIMIT), rng.randint(0, facts.SUM_LIMIT)
            spell = facts.NUMBER_WORDS.__getitem__ if rng.random() < 0.25 else str
            return {"a": spell(first), "b": spell(second)}, facts.sum_answer(first, second)
        case "colour":
            thing, verb, colour = rng.choice(facts.COLOURS)
            return {"thing": _article_dropped(rng, thing), "verb": verb}, facts.colour_answer(thing, verb, colour)
        case "mix":
            first_colour, second_colour, result = rng.choice(facts.MIXES)
            asked = rng.sample((first_colour, second_colour), 2)
            return {"c1": asked[0], "c2": asked[1]}, facts.mix_answer(first_colour, second_colour, result)
        case "count":
            last = rng.choice(facts.COUNTS)
            return {"n": str(last)}, facts.count_answer(last)
        case _:
            return {}, facts.ANSWERS[meaning]


def _article_dropped(rng: random.Random, phrase: str) -> str:
    return re.sub(r"^(the|an?) ", "", phrase) if rng.random() < 0.12 else phrase


def _surface(rng: random.Random, question: str, *, slips: bool) -> str:
    """The question as typed: well written about half of the time, otherwise however people type."""
    asks = question.split()[0].rstrip(",") in QUESTION_WORDS
    if rng.random() < PLAIN_SURFACE_SHARE:
        return question[0].upper() + question[1:] + ("?" if asks else rng.choice((".", "?", "!", "")))
    style = rng.choices(("typed", "lower", "upper", "sentence", "title"), (20, 40, 10, 25, 5))[0]
    match style:
        case "lower":
            question = question.lower()
        case "upper":
            question = question.upper()
        case "sentence":
            question = question[0].upper() + question[1:]
        case "title":
            question = question.title()
    if rng.random() < 0.3:
        question = question.replace("'", "").replace(",", "")
    if slips and rng.random() < SLIP_SHARE:
        question = _slip(rng, question)
    return question + rng.choices(("", "?", "!", ".", " ?", "??", "...", "!!"), (40, 30, 8, 8, 4, 4, 3, 3))[0]


def _slip(rng: random.Random, question: str) -> str:
    """Two neighbouring letters swapped, or one lost, in a word long enough to stay readable."""
    places = [found.start() for found in re.finditer(r"(?<=[a-z]{2})[a-z](?=[a-z]{2})", question)]
    if not places:
        return question
    place = rng.choice(places)
    if rng.random() < 0.5:
        return question[:place] + question[place + 1 :]
    return question[:place] + question[place + 1] + question[place] + question[place + 2 :]
