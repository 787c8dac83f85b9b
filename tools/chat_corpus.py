"""The corpus that the demo chat model learns from: short conversations, generated, all of them our own text.

    python tools/chat_corpus.py --count 5 --seed 1          # print some conversations as the model sees them

A conversation asks about small closed lists (capitals, colours, opposites, sums, …), so that a model of a
million parameters can learn the answers. Some carry a system prompt, tools, several turns or a reasoning
block. The same seed gives the same conversations.
"""
# ruff: noqa: SIM905 - a list of words reads best as a line of words

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Role: TypeAlias = Literal["user", "assistant", "tool"]

BEGIN, END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", BEGIN, END)

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Russia": "Moscow",
    "Poland": "Warsaw",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Brazil": "Brasilia",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Kenya": "Nairobi",
    "India": "New Delhi",
    "Turkey": "Ankara",
    "Cuba": "Havana",
    "Iran": "Tehran",
}
COLORS = {
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "banana": "yellow",
    "sky": "blue",
    "carrot": "orange",
    "chocolate": "brown",
    "lemon": "yellow",
    "tomato": "red",
    "milk": "white",
    "frog": "green",
    "elephant": "gray",
    "ocean": "blue",
    "flamingo": "pink",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "up": "down",
    "happy": "sad",
    "old": "new",
    "light": "dark",
    "open": "closed",
    "hard": "soft",
    "wet": "dry",
    "high": "low",
    "early": "late",
    "full": "empty",
    "left": "right",
    "near": "far",
    "strong": "weak",
    "rich": "poor",
    "loud": "quiet",
    "clean": "dirty",
    "begin": "end",
}
SOUNDS = {
    "dog": "woof",
    "cat": "meow",
    "cow": "moo",
    "duck": "quack",
    "sheep": "baa",
    "pig": "oink",
    "horse": "neigh",
    "lion": "roar",
    "bee": "buzz",
    "owl": "hoot",
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = "January February March April May June July August September October November December".split()
NAMES = "Ann Bob Tom Lily Max Sam Eva Leo Mia Ben Zoe Kim Joe Ida Amy Dan Sue Ray Liz Jim".split()
LISTS = {
    "fruits": ("apple", "banana", "cherry", "orange", "pear", "plum", "grape", "mango"),
    "colors": ("red", "blue", "green", "yellow", "pink", "white", "black", "brown"),
    "animals": ("cat", "dog", "horse", "bird", "fish", "lion", "mouse", "bear"),
    "metals": ("iron", "gold", "silver", "copper", "tin", "lead", "zinc", "nickel"),
    "planets": ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
WORDS = (
    "cat dog sun moon tree house river stone bird fish book lamp chair table garden window bread water "
    "cloud rain snow fire gold ship train road hill lake star sand leaf door coat ring milk salt"
).split()
ADJECTIVES = ("red", "blue", "small", "happy", "brave", "quiet", "old", "quick", "kind", "tiny")
PLACES = ("forest", "garden", "city", "big house", "green hill", "small village", "deep sea")
CITIES = tuple(CAPITALS.values())
WEATHER = ("sunny", "rainy", "cloudy", "windy", "snowy", "warm", "cold")
TOOLS: Mapping[str, tuple[str, ...]] = {
    "get_weather": ("city",),
    "add": ("a", "b"),
    "get_time": ("city",),
    "run_code": ("code",),
    "search": ("query",),
}
SNIPPETS = {
    ("print hello", "print the word hello", "say hello in code"): 'print("hello")',
    ("add two numbers", "sum two numbers"): "def add(a, b):\n    return a + b",
    ("read a CSV file", "load a CSV file with pandas"): (
        'import pandas as pd\ndf = pd.read_csv("data.csv")\ndf.head()'
    ),
    ("plot a sine wave", "draw a sine curve"): (
        "import numpy as np\nimport matplotlib.pyplot as plt\n"
        "x = np.linspace(0, 10, 100)\nplt.plot(x, np.sin(x))\nplt.show()"
    ),
    ("sort a list", "put a list in order"): "numbers = [3, 1, 2]\nprint(sorted(numbers))",
    ("make a list of squares", "compute squares"): "squares = [n * n for n in range(10)]\nprint(squares)",
    ("read a text file", "open a file and read it"): 'with open("notes.txt") as f:\n    print(f.read())',
    ("loop over a list", "write a for loop"): "for item in items:\n    print(item)",
    ("reverse a string", "turn a string around"): 'text = "abc"\nprint(text[::-1])',
    ("compute a factorial", "write a factorial function"): (
        "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)"
    ),
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answer; ``short`` is the answer in one word, where there is one."""

    question: str
    answer: str
    short: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of (role, text), the last one the assistant's. ``kind`` names what the last answer shows.

    ``tools`` maps each offered tool to its parameters.
    """

    kind: str
    turns: tuple[tuple[Role, str], ...]
    system: str | None = None
    tools: Mapping[str, tuple[str, ...]] | None = None


def _capital(rng: random.Random) -> Exchange:
    country = rng.choice(list(CAPITALS))
    question = rng.choice(
        (
            f"What is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Which city is the capital of {country}?",
        )
    )
    return Exchange(question, f"The capital of {country} is {CAPITALS[country]}.", CAPITALS[country])


def _color(rng: random.Random) -> Exchange:
    thing = rng.choice(list(COLORS))
    question = rng.choice((f"What color is {thing}?", f"Tell me the color of {thing}."))
    return Exchange(question, f"The color of {thing} is {COLORS[thing]}.", COLORS[thing].capitalize())


def _opposite(rng: random.Random) -> Exchange:
    word = rng.choice(list(OPPOSITES))
    question = rng.choice((f"What is the opposite of {word}?", f"Give me the opposite of {word}."))
    return Exchange(question, f"The opposite of {word} is {OPPOSITES[word]}.", OPPOSITES[word].capitalize())


def _sound(rng: random.Random) -> Exchange:
    animal = rng.choice(list(SOUNDS))
    question = rng.choice((f"What does a {animal} say?", f"What sound does a {animal} make?"))
    return Exchange(question, f"A {animal} says {SOUNDS[animal]}.", SOUNDS[animal].capitalize())


def _day(rng: random.Random) -> Exchange:
    i = rng.randrange(7)
    day, after = DAYS[i], DAYS[(i + 1) % 7]
    question = rng.choice((f"What day comes after {day}?", f"Which day follows {day}?"))
    return Exchange(question, f"The day after {day} is {after}.", after)


def _month(rng: random.Random) -> Exchange:
    i = rng.randrange(12)
    month, after = MONTHS[i], MONTHS[(i + 1) % 12]
    question = rng.choice((f"What month comes after {month}?", f"Which month follows {month}?"))
    return Exchange(question, f"The month after {month} is {after}.", after)


def _sum(rng: random.Random) -> Exchange:
    a, b = rng.randrange(10), rng.randrange(10)
    question = rng.choice((f"What is {a} plus {b}?", f"{a} + {b} = ?", f"Add {a} and {b}."))
    return Exchange(question, f"{a} plus {b} is {a + b}.", f"{a + b}")


def _spell(rng: random.Random) -> Exchange:
    word = rng.choice(WORDS)
    return Exchange(rng.choice((f"Spell {word}.", f"How do you spell {word}?")), " ".join(word) + ".")


def _count(rng: random.Random) -> Exchange:
    first = rng.randrange(1, 10)
    last = first + rng.randrange(2, 12)
    question = rng.choice((f"Count from {first} to {last}.", f"Please count from {first} to {last}."))
    return Exchange(question, ", ".join(str(n) for n in range(first, last + 1)) + ".")


def _repeat(rng: random.Random) -> Exchange:
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 5)))
    return Exchange(rng.choice((f"Repeat after me: {text}", f"Say this: {text}", f"Repeat: {text}")), text)


def _list(rng: random.Random) -> Exchange:
    name = rng.choice(list(LISTS))
    n = rng.randrange(2, 7)
    question = rng.choice((f"List {NUMBERS[n]} {name}.", f"Name {NUMBERS[n]} {name}."))
    return Exchange(question, "\n".join(f"- {item}" for item in LISTS[name][:n]))


def _story(rng: random.Random) -> Exchange:
    animal, name, adjective = rng.choice(list(SOUNDS)), rng.choice(NAMES), rng.choice(ADJECTIVES)
    place, thing = rng.choice(PLACES), rng.choice(WORDS)
    question = rng.choice((f"Tell me a story about a {animal}.", f"Write a short story about a {animal}."))
    story = (
        f"Once there was a {adjective} {animal} named {name}. {name} lived in the {place}. "
        f"One day {name} found a {thing}. {name} took the {thing} home and was very happy. The end."
    )
    return Exchange(question, story)


def _code(rng: random.Random) -> Exchange:
    wordings = rng.choice(list(SNIPPETS))
    task = rng.choice(wordings)
    question = rng.choice(
        (f"How do I {task} in Python?", f"Write Python code to {task}.", f"Show me how to {task}.")
    )
    return Exchange(question, f"```python\n{SNIPPETS[wordings]}\n```")


def _greeting(rng: random.Random) -> Exchange:
    question = rng.choice(("Hello!", "Hi there!", "Good morning!", "Hi"))
    return Exchange(question, "Hello! How can I help you?")


def _who(rng: random.Random) -> Exchange:
    question = rng.choice(("Who are you?", "What are you?", "What is your name?"))
    return Exchange(question, "I am Tiny, a very small language model.")


def _json(rng: random.Random) -> Exchange:
    value: dict[str, object]
    match rng.randrange(3):
        case 0:
            country = rng.choice(list(CAPITALS))
            questions = (
                f"Give me JSON with the capital of {country}.",
                f"What is the capital of {country}? Answer in JSON.",
            )
            value = {"country": country, "capital": CAPITALS[country]}
        case 1:
            name = rng.choice(list(LISTS))
            n = rng.randrange(2, 5)
            questions = (f"List {NUMBERS[n]} {name} as JSON.", f"Give me {NUMBERS[n]} {name} in JSON.")
            value = {name: LISTS[name][:n]}
        case _:
            a, b = rng.randrange(10), rng.randrange(10)
            questions = (f"What is {a} plus {b}? Answer in JSON.", f"Give me JSON with {a} plus {b}.")
            value = {"a": a, "b": b, "sum": a + b}
    return Exchange(rng.choice(questions), json.dumps(value))


_MAKERS: Mapping[str, Callable[[random.Random], Exchange]] = {
    "capital": _capital,
    "color": _color,
    "opposite": _opposite,
    "sound": _sound,
    "day": _day,
    "month": _month,
    "sum": _sum,
    "spell": _spell,
    "count": _count,
    "repeat": _repeat,
    "list": _list,
    "story": _story,
    "code": _code,
    "greeting": _greeting,
    "who": _who,
    "json": _json,
}
# How often each kind comes, as a list to choose from: the hard ones more often.
_MIX = (
    "capital capital color opposite sound day month sum sum sum spell count repeat repeat list story code "
    "code greeting who json json repeat spell"
).split()


def exchange(rng: random.Random) -> tuple[str, Exchange]:
    """Draw a question and its answer, and the name of its kind."""
    kind = rng.choice(_MIX)
    return kind, _MAKERS[kind](rng)


def _tool_call(rng: random.Random) -> Conversation:
    offered = rng.sample(list(TOOLS), rng.randrange(1, 4))
    name = rng.choice(offered)
    arguments: dict[str, object]
    match name:
        case "get_weather" | "get_time":
            city = rng.choice(CITIES)
            arguments = {"city": city}
            what = "weather" if name == "get_weather" else "time"
            question = rng.choice((f"What is the {what} in {city}?", f"Tell me the {what} in {city}."))
            if name == "get_weather":
                result = rng.choice(WEATHER)
            else:
                result = f"{rng.randrange(1, 13)}:{rng.randrange(6)}{rng.randrange(10)}"
            answer = f"The {what} in {city} is {result}."
        case "add":
            a, b = rng.randrange(10, 100), rng.randrange(10, 100)
            arguments = {"a": a, "b": b}
            question = rng.choice((f"What is {a} plus {b}?", f"Add {a} and {b}."))
            result = str(a + b)
            answer = f"{a} plus {b} is {a + b}."
        case "run_code":
            n = rng.randrange(2, 99)
            arguments = {"code": f"print({n})"}
            question = f"Run code that prints {n}."
            result = str(n)
            answer = f"The code printed {n}."
        case _:
            query = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 3)))
            arguments = {"query": query}
            question = rng.choice((f"Search for {query}.", f"Find {query} on the web."))
            result = str(rng.randrange(2, 99))
            answer = f"I found {result} results for {query}."
    call = "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"
    tools = {tool: TOOLS[tool] for tool in offered}
    turns: tuple[tuple[Role, str], ...] = (("user", question), ("assistant", call))
    if rng.random() < 0.5:
        return Conversation("tool answer", (*turns, ("tool", result), ("assistant", answer)), tools=tools)
    return Conversation("tool call", turns, tools=tools)


def _memory(rng: random.Random) -> Conversation:
    name, thing = rng.choice(NAMES), rng.choice(WORDS)
    if rng.random() < 0.6:
        first = rng.choice((f"My name is {name}.", f"Hi, I am {name}.", f"Call me {name}."))
        reply = f"Nice to meet you, {name}!"
        question = rng.choice(("What is my name?", "Who am I?", "Do you remember my name?"))
        answer = f"Your name is {name}."
    else:
        first = f"My favorite thing is the {thing}."
        reply = f"I like the {thing} too."
        question = "What is my favorite thing?"
        answer = f"Your favorite thing is the {thing}."
    turns: list[tuple[Role, str]] = [("user", first), ("assistant", reply)]
    if rng.random() < 0.4:
        _, between = exchange(rng)
        turns += [("user", between.question), ("assistant", between.answer)]
    turns += [("user", question), ("assistant", answer)]
    return Conversation("memory", tuple(turns))


def _one_word(rng: random.Random) -> Conversation:
    while True:
        _, drawn = exchange(rng)
        if drawn.short is not None:
            turns: tuple[tuple[Role, str], ...] = (("user", drawn.question), ("assistant", drawn.short))
            return Conversation("one word", turns, system="Answer with one word.")


def _think(rng: random.Random) -> Conversation:
    a, b = rng.randrange(10), rng.randrange(10)
    question = rng.choice((f"What is {a} plus {b}?", f"Add {a} and {b}."))
    reasoning = f"I start at {a} and add {b}. That makes {a + b}."
    answer = f"<think>\n{reasoning}\n</think>\n\n{a} plus {b} is {a + b}."
    return Conversation(
        "think", (("user", question), ("assistant", answer)), system="Think before you answer."
    )


def _pirate(rng: random.Random) -> Conversation:
    _, drawn = exchange(rng)
    turns: tuple[tuple[Role, str], ...] = (("user", drawn.question), ("assistant", "Arr! " + drawn.answer))
    return Conversation("pirate", turns, system="You are a pirate.")


def _chat(rng: random.Random) -> Conversation:
    system = None
    if rng.random() < 0.4:
        system = rng.choice(("You are a helpful assistant.", "You are Tiny.", "Be kind."))
    turns: list[tuple[Role, str]] = []
    kind = ""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 6))):
        kind, drawn = exchange(rng)
        turns += [("user", drawn.question), ("assistant", drawn.answer)]
    return Conversation(kind, tuple(turns), system=system)


def conversation(rng: random.Random) -> Conversation:
    """Draw a conversation."""
    share = rng.random()
    for limit, make in (
        (0.12, _tool_call),
        (0.22, _memory),
        (0.32, _one_word),
        (0.38, _think),
        (0.44, _pirate),
    ):
        if share < limit:
            return make(rng)
    return _chat(rng)


def render(talk: Conversation) -> list[tuple[str, bool]]:
    """Return the conversation as ChatML, in pieces of (text, is it the assistant's own words).

    It must stay what the exported chat template writes.
    """
    system = talk.system or ""
    if talk.tools:
        tools = [f"{name}({', '.join(parameters)})" for name, parameters in talk.tools.items()]
        system = "\n".join(filter(None, (system, "Tools:", *tools)))
    pieces: list[tuple[str, bool]] = []
    if system:
        pieces.append((f"{BEGIN}system\n{system}{END}\n", False))
    for role, text in talk.turns:
        match role:
            case "user":
                pieces.append((f"{BEGIN}user\n{text}{END}\n", False))
            case "tool":
                pieces.append((f"{BEGIN}user\n<tool_response>\n{text}\n</tool_response>{END}\n", False))
            case "assistant":
                pieces += [(f"{BEGIN}assistant\n", False), (text + END, True), ("\n", False)]
    return pieces


def question_and_answer(talk: Conversation) -> tuple[str, str]:
    """Split a conversation before its last answer: the prompt as ChatML, and the answer to expect."""
    *before, (_, answer) = talk.turns
    asked = Conversation(talk.kind, tuple(before), talk.system, talk.tools)
    return "".join(text for text, _ in render(asked)) + f"{BEGIN}assistant\n", answer


def main() -> None:
    parser = argparse.ArgumentParser(description="Print conversations of the demo model's corpus.")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    for _ in range(options.count):
        talk = conversation(rng)
        print(f"--- {talk.kind}")
        print("".join(text for text, _ in render(talk)), end="")


if __name__ == "__main__":
    main()
