"""Exact arithmetic from text: a parser over fractions, bounded in length, depth and magnitude. Nothing is evaluated as
code."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction

from luban.core.errors import DataError
from luban.tools.tool import Tool

MAX_LENGTH = 1000  # characters of an expression
MAX_DEPTH = 50  # brackets, functions, signs and powers inside each other
MAX_BITS = 4096  # of a numerator or denominator, also of intermediate results
DIGITS = 15  # of results that have no short decimal form

TOKEN = re.compile(
    r"\s*(?:(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|(\*\*|//|[-+*/%^(),!])|([a-z][a-z0-9]*))"
)
SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "（": "(", "）": ")", "，": ","})


class ArithmeticRefusal(DataError):
    """An expression that can't be computed, or not within the limits."""


def calculate(expression: str) -> Fraction:
    """The exact value of an expression: + - * / // % ** ^, brackets, factorials `n!`, and abs, ceil, exp, factorial, floor,
    gcd, lcm, ln, log10, max, min, pi, round, sqrt. Roots of squares are exact; other roots, exp, ln, log10 and pi are
    correct to 30 digits.

    Raises:
        ArithmeticRefusal: what can't be read and where, a division by zero, or a limit that is exceeded.
    """
    if len(expression) > MAX_LENGTH:
        raise ArithmeticRefusal(f"the expression has {len(expression)} characters, {MAX_LENGTH} are allowed")
    parser = _Parser(expression.translate(SPELLINGS))
    value = parser.sum()
    if parser.token:
        raise parser.unexpected()
    return value


def written(value: Fraction) -> str:
    """A value as text: exact where a decimal of up to 40 digits is, else rounded to 15 significant digits."""
    if value.denominator == 1:
        return str(value.numerator)
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    digits = max(twos, fives)
    if rest == 1 and digits + len(str(abs(value.numerator))) <= 40:
        scaled = str(abs(value.numerator) * 10**digits // value.denominator).rjust(digits + 1, "0")
        return f"{'-' * (value < 0)}{scaled[:-digits]}.{scaled[-digits:]}"
    context = Context(prec=DIGITS, Emax=10**6, Emin=-(10**6))
    return f"{context.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize(context)}"


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ArithmeticRefusal(f"the result is too large: more than {MAX_BITS} bits")
    return value


def _whole(value: Fraction, what: str) -> int:
    if value.denominator != 1:
        raise ArithmeticRefusal(f"{what} needs whole numbers, {written(value)} given")
    return value.numerator


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """`base ** exponent`; a root where the exponent is a fraction."""
    if base == 0 and exponent <= 0:
        if exponent == 0:
            return Fraction(1)
        raise ArithmeticRefusal("division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * max(bits - 1, 1) > MAX_BITS and abs(base) != 1 and base != 0:
        raise ArithmeticRefusal(f"the power is too large: more than {MAX_BITS} bits")
    if exponent.denominator == 1:
        whole = exponent.numerator
        return base ** (whole % 2 if abs(base) == 1 else whole)
    if exponent.denominator == 2:
        return _power(_sqrt(base), Fraction(exponent.numerator))
    if base < 0:
        raise ArithmeticRefusal(f"{written(base)} has no real power {written(exponent)}")
    return _approximate(lambda x: PRECISE.exp(PRECISE.multiply(PRECISE.ln(x), _decimal(exponent))), base)


PRECISE = Context(prec=32, Emax=10**6, Emin=-(10**6))


def _decimal(value: Fraction) -> Decimal:
    return PRECISE.divide(Decimal(value.numerator), Decimal(value.denominator))


def _approximate(function: Callable[[Decimal], Decimal], value: Fraction) -> Fraction:
    result = function(_decimal(value))
    if not result.is_finite() or abs(result.adjusted()) > MAX_BITS * 0.3:
        raise ArithmeticRefusal(f"the result is too large: more than {MAX_BITS} bits")
    return Fraction(result)


def _sqrt(value: Fraction) -> Fraction:
    if value < 0:
        raise ArithmeticRefusal(f"{written(value)} has no real square root")
    roots = math.isqrt(value.numerator), math.isqrt(value.denominator)
    if roots[0] ** 2 == value.numerator and roots[1] ** 2 == value.denominator:
        return Fraction(*roots)
    return _approximate(PRECISE.sqrt, value)


def _logarithm(function: Callable[[Decimal], Decimal]) -> Callable[[Fraction], Fraction]:
    def logarithm(value: Fraction) -> Fraction:
        if value <= 0:
            raise ArithmeticRefusal(f"{written(value)} has no logarithm")
        return _approximate(function, value)

    return logarithm


def _factorial(value: Fraction) -> Fraction:
    number = _whole(value, "a factorial")
    if not 0 <= number <= 500:
        raise ArithmeticRefusal(f"a factorial is taken of 0 to 500, {number} given")
    return Fraction(math.factorial(number))


def _exponential(value: Fraction) -> Fraction:
    if abs(value) > MAX_BITS // 2:
        raise ArithmeticRefusal(f"the power is too large: more than {MAX_BITS} bits")
    return _approximate(PRECISE.exp, value)


def _round(value: Fraction, digits: Fraction | None = None) -> Fraction:
    """Halves away from zero, as people round."""
    places = 0 if digits is None else _whole(digits, "round")
    if abs(places) > 100:
        raise ArithmeticRefusal(f"round takes up to 100 digits, {places} given")
    scaled = abs(value) * Fraction(10) ** places
    rounded = math.floor(scaled + Fraction(1, 2)) / Fraction(10) ** places
    return -rounded if value < 0 else rounded


ONE, ANY = (1, 1), (1, 100)
# name → (fewest and most arguments, function)
FUNCTIONS: dict[str, tuple[tuple[int, int], Callable[..., Fraction]]] = {
    "abs": (ONE, abs),
    "ceil": (ONE, lambda x: Fraction(math.ceil(x))),
    "exp": (ONE, _exponential),
    "factorial": (ONE, _factorial),
    "floor": (ONE, lambda x: Fraction(math.floor(x))),
    "gcd": (ANY, lambda *values: Fraction(math.gcd(*(_whole(v, "gcd") for v in values)))),
    "lcm": (ANY, lambda *values: Fraction(math.lcm(*(_whole(v, "lcm") for v in values)))),
    "ln": (ONE, _logarithm(PRECISE.ln)),
    "log10": (ONE, _logarithm(PRECISE.log10)),
    "max": (ANY, lambda *values: max(values)),
    "min": (ANY, lambda *values: min(values)),
    "round": ((1, 2), _round),
    "sqrt": (ONE, _sqrt),
}
PI = Fraction("3.14159265358979323846264338327950288")


class _Parser:
    """Recursive descent: sum → product → sign → power → postfix → atom. `token` is the one that comes next, "" at the
    end."""

    def __init__(self, text: str):
        self.text, self.at, self.depth, self.token, self.start = text, 0, 0, "", 0
        self.next()

    def next(self) -> str:
        """Go on by a token and return the one that was next."""
        taken = self.token
        found = TOKEN.match(self.text, self.at)
        self.start = self.at
        if found:
            self.token, self.at = found[0].strip(), found.end()
        elif self.text[self.at :].strip():
            self.token = self.text[self.at :].strip()[0]
            raise self.unexpected()
        else:
            self.token = ""
        return taken

    def unexpected(self) -> ArithmeticRefusal:
        """What stands where something else should."""
        what = f"{self.token!r} at character {self.start + 1}" if self.token else "the end"
        known = (
            f" (functions: {', '.join(FUNCTIONS)})" if self.token[:1].isalpha() and self.token not in FUNCTIONS else ""
        )
        return ArithmeticRefusal(f"can't read the expression {self.text[:60]!r}: unexpected {what}{known}")

    def sum(self) -> Fraction:
        """`product ± product …`"""
        value = self.product()
        while self.token in ("+", "-"):
            value = _bounded(value + self.product() if self.next() == "+" else value - self.product())
        return value

    def product(self) -> Fraction:
        """`sign */ sign …`"""
        value = self.sign()
        while self.token in ("*", "/", "//", "%"):
            operator, right = self.next(), self.sign()
            if operator != "*" and right == 0:
                raise ArithmeticRefusal("division by zero")
            if operator == "*":
                value *= right
            elif operator == "/":
                value /= right
            else:
                value = Fraction(value // right) if operator == "//" else value % right
            _bounded(value)
        return value

    def sign(self) -> Fraction:
        """`-sign`, or a power: -2 ** 2 is -4, as in Python."""
        if self.token not in ("+", "-"):
            return self.power()
        negative = self.next() == "-"
        value = self.nested(self.sign)
        return -value if negative else value

    def power(self) -> Fraction:
        """`postfix ** sign`, from the right."""
        base = self.postfix()
        if self.token not in ("**", "^"):
            return base
        self.next()
        return _bounded(_power(base, self.nested(self.sign)))

    def postfix(self) -> Fraction:
        """`atom!`"""
        value = self.atom()
        while self.token == "!":
            self.next()
            value = _bounded(_factorial(value))
        return value

    def nested(self, inside: Callable[[], Fraction]) -> Fraction:
        """`inside`, one level deeper."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ArithmeticRefusal(f"the expression is nested more than {MAX_DEPTH} deep")
        value = inside()
        self.depth -= 1
        return value

    def atom(self) -> Fraction:
        """A number, a bracket, a function or pi."""
        if self.token[:1].isdigit() or self.token.startswith("."):
            return self.number(self.next())
        if self.token == "(":
            self.next()
            value = self.nested(self.sum)
            if self.token != ")":
                raise self.unexpected()
            self.next()
            return value
        if self.token == "pi":
            self.next()
            return PI
        if self.token in FUNCTIONS:
            return self.function(self.next())
        raise self.unexpected()

    def number(self, token: str) -> Fraction:
        """A literal."""
        exponent = token.lower().partition("e")[2]
        if len(exponent) > 5 or abs(int(exponent or "0")) > MAX_BITS:
            raise ArithmeticRefusal(f"the number {token} is too large: more than {MAX_BITS} bits")
        return _bounded(Fraction(token))

    def function(self, name: str) -> Fraction:
        """`name(sum, …)`"""
        if self.token != "(":
            raise self.unexpected()
        arguments = []
        while self.next() in ("(", ",") and self.token != ")":
            arguments.append(self.nested(self.sum))
            if self.token not in (",", ")"):
                raise self.unexpected()
        (fewest, most), function = FUNCTIONS[name]
        if not fewest <= len(arguments) <= most:
            raise ArithmeticRefusal(f"{name} takes {fewest} to {most} arguments, {len(arguments)} given")
        return _bounded(function(*arguments))


def calculator() -> Tool:
    """The calculator as a tool."""
    about = "Computes an arithmetic expression exactly, such as (12.5 + 7) * 3 ** 2 / 4 or round(sqrt(2), 3)."
    text = {"type": "string", "maxLength": MAX_LENGTH}
    schema = {
        "type": "object",
        "properties": {"expression": text},
        "required": ["expression"],
        "additionalProperties": False,
    }
    return Tool(
        name="calculator",
        description=about,
        parameters=schema,
        function=lambda expression: written(calculate(expression)),
    )
