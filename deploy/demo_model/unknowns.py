"""Questions that the built-in model must decline: everything outside its range.

Owns the phrasings of such questions. Many contain invented words, so that "never seen before" itself
becomes a reason to decline. Does not know the wording of the refusal (facts.py).
"""

from __future__ import annotations

import random
from typing import Final

import facts
import phrasings

PATTERNS: Final[tuple[str, ...]] = (
    "(who|what) is {person}",
    "(who is|do you know|tell me about|when was|how old is) {person}( born|)",
    "(what is|what's|define|explain|tell me about|describe|what do you know about) {topic}",
    "(how do i|how can i|can you help me|teach me how to|please|) {action}",
    "(write|write me|compose|give me|create) (a|an) (poem|essay|song|letter|email|haiku|joke|recipe) "
    "(about|for|on) {topic}",
    "(write|give me|show me) (code|a program|a script|a function) (for|that does|about) {topic}",
    "tell me (a joke|a fact|a secret|the news|the time|something interesting|your opinion about {topic})",
    "what is the (weather|time|temperature|news) (in|like in) {place}( today|)",
    "what is the (population|language|currency|flag|president|history|area|largest city) of {place}",
    "(who is|who was) the (president|king|queen|prime minister|leader) of {place}",
    "(which|what) language do they speak in {place}",
    "where is {place}( on the map|)",
    "(how far is|how do i get to|tell me about|what do you know about|have you been to) {place}",
    "what is the capital of {nowhere}",
    "(tell me the |what is the |)capital (city |)of {nowhere}",
    "what (colour|color) (is|are) {nothing}",
    "what is {big}( + |+| plus ){small}",
    "{small}( + |+| plus ){big}",
    "{big}( + |+| plus ){big}",
    "(what is |how much is |){small}( - | minus | times | x | \\* | / | divided by |-|\\*){small}",
    "what is the square root of {big}",
    "(when|why|where|how) (did|do|does|is|was) {topic} (happen|work|end|begin|exist|made)",
    "(who invented|who discovered|who wrote|who made|who painted|who won) {topic}",
    "(translate|how do you say|what is the word for) {word} (in|into|to) {language}",
    "(can you|do you) (sing|dance|swim|cook|drive|play chess|speak {language}|like {topic}|see me|learn)",
    "(what should i|what can i|when should i) (eat|wear|read|watch|buy|study|cook)( today| tonight| tomorrow|)",
    "(is|are) {topic} (good|bad|real|dangerous|expensive|healthy|true)",
    "(i like|i love|i hate|i have|i need|i want) {topic}",
    "(my|the|your) {word} is {word}",
    "{word} {word} {word}",
    "{word} {word}",
    "(what|who|why|where|when|how) (is|are|was|does) {word} {word}( {word}|)",
    "(what is|who is) {word}",
    "{word}",
    "(which|what) is (better|bigger|older|faster), {topic} or {topic}",
    "how many {topic} are there( in {place}|)",
    "(summarise|summarize|rewrite|continue|correct) (this text|this|my essay|the following)( for me|)",
    "what is the meaning of (life|{topic}|{word})",
    "(mix|what do) {word} and {word}( make|)",
    "(name|list|tell me) (five|ten|three|some|all) {topic}",
)


def listed(values: str) -> tuple[str, ...]:
    return tuple(values.split("|"))


PERSONS: Final = listed(
    "Albert Einstein|Marie Curie|Napoleon|Shakespeare|Mozart|Isaac Newton|Ada Lovelace|Alan Turing|"
    "Leonardo da Vinci|Cleopatra|Picasso|Julius Caesar|my neighbour|your boss|your best friend|Santa Claus"
)
TOPICS: Final = listed(
    "quantum physics|the moon|democracy|cats|dogs|horses|love|football|the internet|gravity|black holes|music|"
    "chess|photosynthesis|the second world war|python|linux|bitcoin|the stock market|dinosaurs|mathematics|"
    "climate change|philosophy|poetry|cars|electricity|the universe|atoms|evolution|a good book|a neural network|"
    "movies|pizza|bread|tea|wine|tennis|the olympics|space travel|robots|the human brain|medicine|vaccines|"
    "history|geography|art|the french revolution|the pyramids|television|birds|fish|trees|planets|stars|"
    "ships|trains|bicycles|the world cup|cooking|gardening|sleep|dreams|money|taxes|the law|religion|school|"
    "computers|a compiler|a database|an operating system|volcanoes|earthquakes|rivers|mountains|islands|books"
)
ACTIONS: Final = listed(
    "bake a cake|fix my bicycle|learn the piano|lose weight|cook rice|write a book|sort a list|tie a tie|"
    "boil an egg|buy a house|find a job|plan my trip|book a flight|play the song|call my mother|open the door|"
    "turn on the light|set an alarm|do my homework|paint a wall|grow tomatoes|repair a car|build a website|"
    "sleep better|make coffee|learn french|cut my hair|train a dog|remember names|draw a horse"
)
LANGUAGES: Final = listed("French|German|Spanish|Japanese|Latin|Italian|Chinese|Greek|Dutch|Russian")
NOWHERE: Final = listed(
    "Atlantis|Narnia|Wakanda|Mordor|the moon|Mars|Bolivia|Angola|Haiti|Laos|Oman|Qatar|Zambia|Uganda|Yemen|"
    "Texas|California|Europe|Africa|Asia|Madagascar|Bhutan|Fiji|Senegal|Mali|Chad|Togo|Honduras|Panama|"
    "Guatemala|Sudan|Somalia|Rwanda|Niger|Namibia|Mozambique|Kuwait|Kosovo|Jordan|Israel|Belarus|Moldova"
)
NOTHING: Final = listed(
    "my car|your house|the wall|my shirt|a dragon|a mirror|the book|my phone|happiness|his hat|a cat|a dog|"
    "the wind|my hair|time|your eyes|the door|music|my bag|a horse|the universe|numbers|your screen|a shoe"
)
ONSETS: Final = listed("b|c|d|f|g|h|j|k|l|m|n|p|r|s|t|v|w|z|br|cl|dr|fl|gr|pl|pr|sh|st|th|tr|ch|sk|sw")
VOWELS: Final = listed("a|e|i|o|u|ai|ea|ee|oo|ou|y")
CODAS: Final = listed("|||n|r|s|t|l|m|ck|nd|st|p|ng|x")
_TEMPLATES: Final = tuple(tuple(phrasings.expand(pattern)) for pattern in PATTERNS)


def invented_word(rng: random.Random) -> str:
    """A pronounceable word that most likely means nothing."""
    syllables = rng.choice((1, 2, 2, 3))
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))


def _choice(rng: random.Random, known: tuple[str, ...], *, title: bool = False) -> str:
    """A listed value, or as often an invented one: the list must not become the reason to decline."""
    if rng.random() < 0.5:
        return rng.choice(known)
    word = invented_word(rng)
    return word.title() if title else word


def unknown_question(rng: random.Random, *, held_out: bool) -> str:
    """A question outside the range, from the templates of the asked side of the split."""
    while True:
        template = rng.choice(rng.choice(_TEMPLATES))
        # Templates that are little else than their slots say nothing new: training keeps those.
        kept_back = phrasings.is_held_out("unknown", template) and len(template.split()) > 2
        if kept_back == held_out:
            break
    question = template
    while "{" in question:
        start, end = question.index("{"), question.index("}")
        question = question[:start] + _slot(rng, question[start + 1 : end]) + question[end + 1 :]
    return question


def _slot(rng: random.Random, slot: str) -> str:
    match slot:
        case "person":
            return _choice(rng, PERSONS, title=True)
        case "topic":
            return _choice(rng, TOPICS)
        case "action":
            return _choice(rng, ACTIONS)
        case "language":
            return rng.choice(LANGUAGES)
        case "place":
            return _choice(rng, tuple(facts.CAPITALS), title=True)
        case "nowhere":
            return _choice(rng, NOWHERE, title=True)
        case "nothing":
            return _choice(rng, NOTHING)
        case "big":
            return str(rng.randint(facts.SUM_LIMIT + 1, 999))
        case "small":
            return str(rng.randint(0, facts.SUM_LIMIT))
        case _:
            return invented_word(rng)
