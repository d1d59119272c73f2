"""Random expressions with brackets, and equations with one unknown, modulo a number."""

from __future__ import annotations

import numpy as np

PLUS, MINUS, TIMES, OPEN, CLOSE, UNKNOWN, EQUALS = 5, 6, 7, 8, 9, 10, 11  # tokens behind the digits 0 to 4


def random_expression(rng: np.random.Generator, length: int, modulus: int, *, times: bool) -> tuple[list[int], int]:
    """(tokens, value): a number, a signed number in brackets, or two expressions and an operation in brackets.

    Args:
        times: products occur.
    """
    if length == 1:
        value = int(rng.integers(modulus))
        return [value], value
    if length == 2:
        value = int(rng.integers(modulus))
        return [MINUS, value], -value % modulus
    if length == 3:
        inner, value = random_expression(rng, 1, modulus, times=times)
        return [OPEN, *inner, CLOSE], value
    if length == 4:
        inner, value = random_expression(rng, 2, modulus, times=times)
        return [OPEN, *inner, CLOSE], value
    left = int(rng.integers(1, length - 3))
    first, a = random_expression(rng, left, modulus, times=times)
    second, b = random_expression(rng, length - 3 - left, modulus, times=times)
    operation = int(rng.integers(PLUS, TIMES + 1 if times else TIMES))
    value = {PLUS: a + b, MINUS: a - b, TIMES: a * b}[operation] % modulus
    return [OPEN, *first, operation, *second, CLOSE], value


def random_equation(rng: np.random.Generator, length: int, modulus: int) -> tuple[list[int], int]:
    """(tokens, value of x): an expression without products, in which one number is x, so that x has one value; = and what it is."""
    row, value = random_expression(rng, length - 2, modulus, times=False)
    places = [at for at, token in enumerate(row) if token < modulus]
    at = places[int(rng.integers(len(places)))]
    answer, row[at] = row[at], UNKNOWN
    return [*row, EQUALS, value], answer
