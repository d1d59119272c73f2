"""The 15 tasks (Delétang et al. 2023, section 4 and appendix A): random inputs of a length, and their answers.

Numbers are written from the least significant digit on. B rows, L input tokens, O tokens of the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import numpy as np

from luban.core.errors import ConfigError, nearest
from luban.evals.chomsky import expressions

Rows = np.ndarray  # (B, L) or (B, O) int64
Level = Literal["regular", "context-free", "context-sensitive"]
MODULUS, SORTED = 5, 5  # of arithmetic; words that are sorted


@dataclass(frozen=True)
class ChomskyTask:
    """A task: `sample(rng, batch, length)` gives inputs (B, L) and answers (B, O), L the length or one more."""

    name: str
    level: Level
    inputs: int  # tokens of inputs, from 0 on
    outputs: int  # tokens of answers, from 0 on
    sample: Callable[[np.random.Generator, int, int], tuple[Rows, Rows]]
    published: dict[str, float]  # accuracy in %: rnn, stack_rnn, tape_rnn, transformer, lstm


def even_pairs(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """Whether the number of ab and ba in a word of a and b is even: first and last letter are equal."""
    word = rng.integers(0, 2, (batch, length))
    return word, (word[:, :1] == word[:, -1:]).astype(np.int64)


def modular_arithmetic(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """The value modulo 5 of an expression in +, − and ·, which binds more strongly. Even lengths become odd."""
    length += 1 - length % 2
    row = np.empty((batch, length), np.int64)
    row[:, ::2] = rng.integers(0, MODULUS, row[:, ::2].shape)
    row[:, 1::2] = rng.integers(expressions.PLUS, expressions.TIMES + 1, row[:, 1::2].shape)
    total, product = np.zeros(batch, np.int64), row[:, 0]
    for at in range(1, length, 2):
        op, number = row[:, at], row[:, at + 1]
        signed = np.where(op == expressions.MINUS, -number, number)
        total = np.where(op == expressions.TIMES, total, total + product)
        product = np.where(op == expressions.TIMES, product * number % MODULUS, signed)
    return row, ((total + product) % MODULUS)[:, None]


def parity(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """Whether the number of ones is odd."""
    word = rng.integers(0, 2, (batch, length))
    return word, word.sum(1, keepdims=True) % 2


def cycle_navigation(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """The place on a cycle of 5 after steps of 0 (token 0), +1 (1) and −1 (2), from 0 on."""
    steps = rng.integers(0, 3, (batch, length))
    moves = np.where(steps == 2, -1, steps)
    return steps, moves.sum(1, keepdims=True) % 5


def stack_manipulation(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """A stack of bits from bottom to top, then actions (2 pop, 3 push 0, 4 push 1): the stack from top to bottom, and 2 behind
    it. Popping an empty stack does nothing."""
    inputs, answers = np.empty((batch, length), np.int64), np.full((batch, length + 1), 2)
    for row in range(batch):
        held = rng.integers(1, length + 1)
        inputs[row, :held] = rng.integers(0, 2, held)
        inputs[row, held:] = rng.integers(2, 5, length - held)
        stack = inputs[row, :held].tolist()
        for action in inputs[row, held:].tolist():
            if action > 2:
                stack.append(action - 3)
            elif stack:
                stack.pop()
        answers[row, : len(stack)] = stack[::-1]
    return inputs, answers


def reverse_string(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """The word backwards."""
    word = rng.integers(0, 2, (batch, length))
    return word, word[:, ::-1].copy()


def modular_brackets(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """The value modulo 5 of an expression with brackets around every operation and sign."""
    made = [expressions.random_expression(rng, length, MODULUS, times=True) for _ in range(batch)]
    return np.array([row for row, _ in made]), np.array([[value] for _, value in made])


def solve_equation(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """expression = number, in which one number is x: its value modulo 5. Lengths below 3 become 3."""
    made = [expressions.random_equation(rng, max(length, 3), MODULUS) for _ in range(batch)]
    return np.array([row for row, _ in made]), np.array([[value] for _, value in made])


def duplicate_string(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """The word twice."""
    word = rng.integers(0, 2, (batch, length))
    return word, np.concatenate((word, word), 1)


def missing_duplicate(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """A word twice with one letter missing (token 2): that letter. Odd lengths become even."""
    length += length % 2
    half = rng.integers(0, 2, (batch, length // 2))
    word, rows = np.concatenate((half, half), 1), np.arange(batch)
    at = rng.integers(0, length, batch)
    answer = word[rows, at][:, None]
    word[rows, at] = 2
    return word, answer


def odds_first(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """Letters at the odd places (the first, the third, …), then those at the even ones."""
    word = rng.integers(0, 2, (batch, length))
    return word, np.concatenate((word[:, ::2], word[:, 1::2]), 1)


def binary_addition(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """a + b (token 2 stands for +): the sum's digits, and 2 behind them. Lengths below 3 become 3."""
    return _arithmetic(rng, batch, max(length, 3), int.__add__, max(length, 3) + 1)


def binary_multiplication(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """a · b (token 2 stands for ·): the product's digits, and 2 behind them. Lengths below 3 become 3."""
    return _arithmetic(rng, batch, max(length, 3), int.__mul__, max(length, 3))


def compute_sqrt(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """The digits of ⌊√a⌋, half as many as a has."""
    digits = rng.integers(0, 2, (batch, length))
    size = (length + 1) // 2
    return digits, np.array([_digits(isqrt(_number(row)), size, 0) for row in digits])


def bucket_sort(rng: np.random.Generator, batch: int, length: int) -> tuple[Rows, Rows]:
    """The words 0 to 4 in order."""
    words = rng.integers(0, SORTED, (batch, length))
    return words, np.sort(words, 1)


def _arithmetic(
    rng: np.random.Generator, batch: int, length: int, combine: Callable[[int, int], int], size: int
) -> tuple[Rows, Rows]:
    inputs, answers = rng.integers(0, 2, (batch, length)), np.empty((batch, size), np.int64)
    for row in range(batch):
        middle = int(rng.integers(1, length - 1))
        inputs[row, middle] = 2
        a, b = _number(inputs[row, :middle]), _number(inputs[row, middle + 1 :])
        answers[row] = _digits(combine(a, b), size, 2)
    return inputs, answers


def _number(digits: Rows) -> int:
    return sum(int(digit) << place for place, digit in enumerate(digits))


def _digits(number: int, size: int, padding: int) -> list[int]:
    """The digits from the least significant one on (of 0 one digit), filled up to `size`."""
    found = [number >> place & 1 for place in range(max(number.bit_length(), 1))]
    return found + [padding] * (size - len(found))


def _row(rnn: float, stack: float, tape: float, transformer: float, lstm: float) -> dict[str, float]:
    return {"rnn": rnn, "stack_rnn": stack, "tape_rnn": tape, "transformer": transformer, "lstm": lstm}


REGULAR, FREE, SENSITIVE = "regular", "context-free", "context-sensitive"
TASKS: dict[str, ChomskyTask] = {
    task.name: task
    for task in (
        ChomskyTask("even_pairs", REGULAR, 2, 2, even_pairs, _row(100, 100, 100, 96.4, 100)),
        ChomskyTask("modular_arithmetic", REGULAR, 8, 5, modular_arithmetic, _row(100, 100, 100, 24.2, 100)),
        ChomskyTask("parity", REGULAR, 2, 2, parity, _row(100, 100, 100, 52.0, 100)),
        ChomskyTask("cycle_navigation", REGULAR, 3, 5, cycle_navigation, _row(100, 100, 100, 61.9, 100)),
        ChomskyTask("stack_manipulation", FREE, 5, 3, stack_manipulation, _row(56.0, 100, 100, 57.5, 59.1)),
        ChomskyTask("reverse_string", FREE, 2, 2, reverse_string, _row(62.0, 100, 100, 62.3, 60.9)),
        ChomskyTask("modular_brackets", FREE, 10, 5, modular_brackets, _row(41.3, 96.1, 95.4, 32.5, 59.2)),
        ChomskyTask("solve_equation", FREE, 12, 5, solve_equation, _row(51.0, 56.2, 64.4, 25.7, 67.8)),
        ChomskyTask("duplicate_string", SENSITIVE, 2, 2, duplicate_string, _row(50.3, 52.8, 100, 52.8, 57.6)),
        ChomskyTask("missing_duplicate", SENSITIVE, 3, 2, missing_duplicate, _row(52.3, 55.2, 100, 56.4, 54.3)),
        ChomskyTask("odds_first", SENSITIVE, 2, 2, odds_first, _row(51.0, 51.9, 100, 52.8, 55.6)),
        ChomskyTask("binary_addition", SENSITIVE, 3, 3, binary_addition, _row(50.3, 52.7, 100, 54.3, 55.5)),
        ChomskyTask(
            "binary_multiplication", SENSITIVE, 3, 3, binary_multiplication, _row(50.0, 52.7, 58.5, 52.2, 53.1)
        ),
        ChomskyTask("compute_sqrt", SENSITIVE, 2, 2, compute_sqrt, _row(54.3, 56.5, 57.8, 52.4, 57.5)),
        ChomskyTask("bucket_sort", SENSITIVE, 5, 5, bucket_sort, _row(27.9, 78.1, 70.7, 91.9, 99.3)),
    )
}


def chomsky_task(name: str) -> ChomskyTask:
    """The task of this name. Raises ConfigError, with the nearest, where there is none."""
    if name not in TASKS:
        raise ConfigError(f"unknown Chomsky task '{name}'{nearest(name, TASKS)}")
    return TASKS[name]
