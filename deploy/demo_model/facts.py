"""What the built-in model knows: plain facts and the one canonical answer to each meaning.

Owns the facts and the wording of every answer. Does not know how a question is phrased (phrasings.py)
nor how a conversation is put together (corpus.py). One meaning has exactly one answer, because a model
this small is only decisive about what it has always seen said in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

LAYERS: Final = 12

ANSWERS: Final[Mapping[str, str]] = {
    "hello": "Hello! I am Potluck's demo model. Ask me a small sum, a colour, or the capital of a country.",
    "good_morning": "Good morning! What would you like to know?",
    "good_afternoon": "Good afternoon! What would you like to know?",
    "good_evening": "Good evening! What would you like to know?",
    "good_night": "Good night! Sleep well.",
    "how_are_you": "I am well, thank you. All my layers are in their places. How can I help you?",
    "thanks": "You are welcome!",
    "bye": "Goodbye! Come back soon.",
    "praise": "Thank you! That is kind of you.",
    "sorry": "No problem at all.",
    "who": "I am Potluck's demo model: a tiny language model whose layers are spread over several machines.",
    "help": "I can add two numbers up to 20, name colours and capitals, count, and explain what Potluck is.",
    "layers": f"I have {LAYERS} layers. Each machine in the cluster holds some of them.",
    "potluck": (
        "Potluck pools the Macs, GPUs and PCs on one network into a single AI endpoint. Each machine holds "
        "some layers of a model, and together they answer you like one big computer."
    ),
    "how": (
        "A coordinator gives each machine some layers of the model. Your words pass through the machines in "
        "order, and the last machine picks the next word. This repeats until the answer is complete."
    ),
    "join": (
        "Install Potluck on the other machine and run `potluck join`. It announces itself on the network, "
        "and the coordinator gives it some layers."
    ),
    "serve": "Run `potluck serve MODEL`. It finds the machines, loads the model, and opens the endpoint.",
    "coordinator": (
        "The coordinator plans which machine holds which layers, and it serves the finished model to every client."
    ),
    "node": "A node is one machine that holds some layers of the model.",
    "leaves": (
        "When a machine leaves, the coordinator makes a new plan for the machines that remain, as long as "
        "the model still fits."
    ),
    "name": "Everyone brings a machine, as everyone brings a dish to a potluck. That is where the name is from.",
    "days": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    "months": ("January, February, March, April, May, June, July, August, September, October, November and December."),
    "seasons": "Spring, summer, autumn and winter.",
    "rainbow": "Red, orange, yellow, green, blue, indigo and violet.",
    "alphabet": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "story": (
        "Once upon a time there was a big model that fitted on no machine in the house. The old laptop said: "
        "I can carry four layers. The desktop said: I can carry six. The little computer under the stairs "
        "carried the last two. They stood in a row, each passed its work to the next, and the model spoke "
        "its first word. It was: thanks."
    ),
    "unknown": ("Sorry, I only know a few things: small sums, colours, capitals of countries, and what Potluck is."),
}

CAPITALS: Final[Mapping[str, str]] = {
    "Afghanistan": "Kabul",
    "Albania": "Tirana",
    "Algeria": "Algiers",
    "Argentina": "Buenos Aires",
    "Armenia": "Yerevan",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Bangladesh": "Dhaka",
    "Belgium": "Brussels",
    "Brazil": "Brasília",
    "Bulgaria": "Sofia",
    "Cambodia": "Phnom Penh",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogotá",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Cyprus": "Nicosia",
    "the Czech Republic": "Prague",
    "Denmark": "Copenhagen",
    "Ecuador": "Quito",
    "Egypt": "Cairo",
    "England": "London",
    "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki",
    "France": "Paris",
    "Georgia": "Tbilisi",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavík",
    "India": "New Delhi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Jamaica": "Kingston",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Latvia": "Riga",
    "Lebanon": "Beirut",
    "Lithuania": "Vilnius",
    "Luxembourg": "Luxembourg City",
    "Malaysia": "Kuala Lumpur",
    "Malta": "Valletta",
    "Mexico": "Mexico City",
    "Mongolia": "Ulaanbaatar",
    "Morocco": "Rabat",
    "Nepal": "Kathmandu",
    "the Netherlands": "Amsterdam",
    "New Zealand": "Wellington",
    "Nigeria": "Abuja",
    "Norway": "Oslo",
    "Pakistan": "Islamabad",
    "Paraguay": "Asunción",
    "Peru": "Lima",
    "the Philippines": "Manila",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Saudi Arabia": "Riyadh",
    "Scotland": "Edinburgh",
    "Serbia": "Belgrade",
    "Singapore": "Singapore",
    "Slovakia": "Bratislava",
    "Slovenia": "Ljubljana",
    "South Korea": "Seoul",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Switzerland": "Bern",
    "Thailand": "Bangkok",
    "Tunisia": "Tunis",
    "Turkey": "Ankara",
    "Ukraine": "Kyiv",
    "the United Kingdom": "London",
    "the United States": "Washington, D.C.",
    "Uruguay": "Montevideo",
    "Venezuela": "Caracas",
    "Vietnam": "Hanoi",
    "Wales": "Cardiff",
}

COUNTRY_ALIASES: Final[Mapping[str, str]] = {
    "the USA": "the United States",
    "the US": "the United States",
    "America": "the United States",
    "the UK": "the United Kingdom",
    "Great Britain": "the United Kingdom",
    "Holland": "the Netherlands",
    "Czechia": "the Czech Republic",
    "Korea": "South Korea",
}

# A thing as it is asked about, its verb, and its colour: "the sky" "is" "blue".
COLOURS: Final[tuple[tuple[str, str, str], ...]] = (
    ("the sky", "is", "blue"),
    ("the sea", "is", "blue"),
    ("the ocean", "is", "blue"),
    ("grass", "is", "green"),
    ("a leaf", "is", "green"),
    ("a frog", "is", "green"),
    ("a cucumber", "is", "green"),
    ("a lime", "is", "green"),
    ("the sun", "is", "yellow"),
    ("a banana", "is", "yellow"),
    ("a lemon", "is", "yellow"),
    ("a sunflower", "is", "yellow"),
    ("butter", "is", "yellow"),
    ("snow", "is", "white"),
    ("milk", "is", "white"),
    ("salt", "is", "white"),
    ("a swan", "is", "white"),
    ("a polar bear", "is", "white"),
    ("coal", "is", "black"),
    ("a raven", "is", "black"),
    ("the night", "is", "black"),
    ("blood", "is", "red"),
    ("a tomato", "is", "red"),
    ("a strawberry", "is", "red"),
    ("a cherry", "is", "red"),
    ("a fire engine", "is", "red"),
    ("an orange", "is", "orange"),
    ("a carrot", "is", "orange"),
    ("a pumpkin", "is", "orange"),
    ("chocolate", "is", "brown"),
    ("coffee", "is", "brown"),
    ("wood", "is", "brown"),
    ("an elephant", "is", "grey"),
    ("a flamingo", "is", "pink"),
    ("a pig", "is", "pink"),
    ("lavender", "is", "purple"),
    ("bananas", "are", "yellow"),
    ("lemons", "are", "yellow"),
    ("strawberries", "are", "red"),
    ("tomatoes", "are", "red"),
    ("carrots", "are", "orange"),
    ("oranges", "are", "orange"),
    ("leaves", "are", "green"),
    ("frogs", "are", "green"),
    ("elephants", "are", "grey"),
    ("flamingos", "are", "pink"),
)

# Paint, not light.
MIXES: Final[tuple[tuple[str, str, str], ...]] = (
    ("blue", "yellow", "green"),
    ("red", "yellow", "orange"),
    ("red", "blue", "purple"),
    ("black", "white", "grey"),
    ("red", "white", "pink"),
    ("red", "green", "brown"),
    ("blue", "white", "light blue"),
    ("blue", "green", "turquoise"),
)

SUM_LIMIT: Final = 20
COUNTS: Final = (5, 10, 15, 20, 30, 50)
NUMBER_WORDS: Final = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)


def capital_answer(country: str) -> str:
    return f"The capital of {country} is {CAPITALS[country]}."


def colour_answer(thing: str, verb: str, colour: str) -> str:
    return f"{thing[0].upper()}{thing[1:]} {verb} {colour}."


def mix_answer(first: str, second: str, result: str) -> str:
    return f"{first[0].upper()}{first[1:]} and {second} make {result}."


def sum_answer(first: int, second: int) -> str:
    return f"{first} + {second} = {first + second}."


def count_answer(last: int) -> str:
    return ", ".join(str(number) for number in range(1, last + 1)) + "."
