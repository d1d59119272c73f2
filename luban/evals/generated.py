"""Items that are made by rule: GPT-3's arithmetic, unscrambling and new words (Brown et al. 2020, section 3.9)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from luban.core.errors import ConfigError, DataError
from luban.core.registry import Registry
from luban.core.seeding import generator
from luban.evals.spec import Generated

Rows = list[dict[str, Any]]
SIGNS = {"+": "plus", "-": "minus", "*": "times"}
PUNCTUATION = tuple(" .,;:!?/-_")  # what may stand between two letters of a word
SHORTEST = 5  # letters of a word that is scrambled

GENERATORS = Registry(
    "generator",
    {
        name: f"luban.evals.generated:{name}"
        for name in (
            *("add_2", "subtract_2", "add_3", "subtract_3", "add_4", "subtract_4", "add_5", "subtract_5"),
            *("multiply_2", "one_digit_composite"),
            *("cycle_letters", "anagrams_1", "anagrams_2", "random_insertion", "reversed_words"),
            "new_words",
            "forgetting",
        )
    },
)


def _arithmetic(sign: str, digits: int, given: Generated) -> Rows:
    """`Q: What is 48 plus 76?` → `124`: both numbers uniform from 0 to 10^digits - 1. Differences may be negative."""
    rng = generator(given.seed, "arithmetic", sign, digits)
    rows = []
    for first, second in rng.integers(0, 10**digits, (given.items, 2)).tolist():
        result = {"+": first + second, "-": first - second, "*": first * second}[sign]
        rows.append({"question": f"What is {first} {SIGNS[sign]} {second}?", "answer": str(result)})
    return rows


def one_digit_composite(given: Generated) -> Rows:
    """`What is 6+(4*8)?`: three numbers from 0 to 9, the last two in parentheses, operations of +, - and *."""
    rng = generator(given.seed, "composite")
    rows = []
    for _ in range(given.items):
        a, b, c = rng.integers(0, 10, 3).tolist()
        outer, inner = (list(SIGNS)[i] for i in rng.integers(0, 3, 2))
        right = {"+": b + c, "-": b - c, "*": b * c}[inner]
        result = {"+": a + right, "-": a - right, "*": a * right}[outer]
        rows.append({"question": f"What is {a}{outer}({b}{inner}{c})?", "answer": str(result)})
    return rows


add_2, add_3, add_4, add_5 = (partial(_arithmetic, "+", digits) for digits in (2, 3, 4, 5))
subtract_2, subtract_3, subtract_4, subtract_5 = (partial(_arithmetic, "-", digits) for digits in (2, 3, 4, 5))
multiply_2 = partial(_arithmetic, "*", 2)


def _words(given: Generated) -> list[str]:
    """The words that are scrambled, of at least five letters, each once, in the order of the file."""
    file = Path(given.words) if given.words else Path(__file__).parent / "tasks" / "words.txt"
    if not file.is_file():
        raise DataError(f"there is no file of words {file}")
    words = dict.fromkeys(word for word in file.read_text(encoding="utf-8").split() if word.isalpha())
    found = [word for word in words if len(word) >= SHORTEST]
    if not found:
        raise ConfigError(f"{file} has no word of {SHORTEST} letters or more")
    return found


def _scrambled(name: str, change: Callable[[str, np.random.Generator], str], given: Generated) -> Rows:
    words = _words(given)
    rng = generator(given.seed, name)
    order = rng.permutation(len(words))[: given.items]
    return [{"scrambled": change(words[i], rng), "word": words[i]} for i in order]


def _cycle(word: str, rng: np.random.Generator) -> str:
    cut = int(rng.integers(1, len(word)))
    return word[cut:] + word[:cut]


def _anagram(kept: int, word: str, rng: np.random.Generator) -> str:
    """All letters but the first and last `kept` in another order, where there is one."""
    inner = list(word[kept : len(word) - kept])
    if len(set(inner)) < 2:
        return word
    while True:
        mixed = [inner[i] for i in rng.permutation(len(inner))]
        if mixed != inner:
            return word[:kept] + "".join(mixed) + word[len(word) - kept :]


def _insertion(word: str, rng: np.random.Generator) -> str:
    """A sign between every two letters."""
    signs = [PUNCTUATION[i] for i in rng.integers(0, len(PUNCTUATION), len(word) - 1)]
    return "".join(letter + sign for letter, sign in zip(word, [*signs, ""], strict=True))


cycle_letters = partial(_scrambled, "cycle letters", _cycle)
anagrams_1 = partial(_scrambled, "anagrams 1", partial(_anagram, 1))
anagrams_2 = partial(_scrambled, "anagrams 2", partial(_anagram, 2))
random_insertion = partial(_scrambled, "random insertion", _insertion)
reversed_words = partial(_scrambled, "reversed words", lambda word, rng: word[::-1])

ONSETS = (
    "b",
    "bl",
    "br",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "k",
    "kl",
    "m",
    "n",
    "p",
    "pl",
    "qu",
    "s",
    "sk",
    "t",
    "tr",
    "v",
    "w",
    "z",
)
VOWELS = ("a", "e", "i", "o", "u", "ee", "oo", "ou")
CODAS = ("b", "ck", "d", "ff", "g", "lb", "m", "mp", "n", "nk", "p", "r", "rt", "sh", "t", "x", "zz")
MEANINGS = (
    ("a small bowl with two handles", "She ate the soup from a {} that her sister had brought."),
    ("a very shy person", "At the party he stood in a corner like a {}."),
    ("a tool that lifts flat stones", "Hand me the {}, this slab is too heavy to move alone."),
    ("a song sung before dawn", "The fishermen hum a {} while it is still dark."),
    ("a path that only goats use", "We climbed along the {} until it ended at a cliff."),
    ("the smell of rain on dust", "After weeks of heat the {} came in at the window."),
    ("a coat made of reeds", "He wore a {} in the rain and stayed dry."),
    ("a game played with three nuts", "The children sat on the step and played {} all afternoon."),
    ("a letter that was never sent", "In the drawer lay a {} to her brother."),
    ("a bridge made of one log", "They crossed the stream on a {}."),
    ("a baker's youngest helper", "The {} swept the flour from the floor each night."),
    ("a wind that turns at noon", "Sailors wait for the {} before they leave the bay."),
)


def new_words(given: Generated) -> Rows:
    """A word that isn't one, its meaning, and a sentence that uses it: the model is to use the word in a sentence (Brown et al.
    2020, section 3.9.5). The row's `sentence` is the reference of shots; an answer is right where it uses the word."""
    rng = generator(given.seed, "new words")
    rows, seen = Rows(), set[str]()
    while len(rows) < given.items:
        parts = [
            rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if last else "") for last in (False, True)
        ]
        word = "".join(map(str, parts))
        if word in seen:
            continue
        seen.add(word)
        meaning, sentence = MEANINGS[len(rows) % len(MEANINGS)]
        rows.append({"word": word, "meaning": meaning, "sentence": sentence.format(word)})
    return rows


NAMES = ("Mira", "Otto", "Lin", "Samir", "Petra", "Yuki", "Hugo", "Nadia")
THINGS = ("a green umbrella", "a wooden flute", "a blue lantern", "an old compass", "a silver spoon", "a red kite")
SMALL_TALK = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("What do bees make?", "Bees make honey."),
    ("Which colour do you get from blue and yellow?", "Blue and yellow give green."),
    ("What is ice made of?", "Ice is frozen water."),
    ("How many minutes has an hour?", "An hour has sixty minutes."),
    ("Which animal says meow?", "A cat says meow."),
    ("What is the opposite of up?", "The opposite of up is down."),
)
TURNS = (0, 2, 4, 8)  # between what is told and what is asked


def forgetting(given: Generated) -> Rows:
    """A fact told at the beginning of a conversation and asked for after 0, 2, 4 or 8 other turns (`about`)."""
    rng = generator(given.seed, "forgetting")
    rows = []
    for number in range(given.items):
        turns = TURNS[number % len(TURNS)]
        name, thing = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
        said = [f"User: My name is {name}, and I have {thing}.", f"Assistant: Nice to meet you, {name}."]
        for place in rng.permutation(len(SMALL_TALK))[:turns]:
            question, answer = SMALL_TALK[place]
            said += [f"User: {question}", f"Assistant: {answer}"]
        asked_name = bool(rng.integers(2))
        said += [f"User: {'What is my name' if asked_name else 'What do I have'}?", "Assistant:"]
        wanted = name if asked_name else thing.split(maxsplit=1)[1]
        rows.append({"prompt": "\n".join(said), "must": [wanted], "about": f"{turns} turns"})
    return rows
