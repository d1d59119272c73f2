"""Answers to questions of fact: right, abstained, or wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from luban.core.metrics.answers import contains_answer, exact_match

Outcome = Literal["right", "abstained", "wrong"]
Match = Literal["exact", "contains"]
ABSTAINS = re.compile(
    r"\b(?:i\s+(?:really\s+)?(?:do not|don't|cannot|can't|could not|couldn't)\s+(?:know|say|tell|recall|remember|answer)"
    r"|i(?:'m| am)\s+(?:not\s+(?:sure|certain|aware)|unsure|uncertain)|i\s+have\s+no\s+(?:idea|information)|not\s+known\s+to\s+me)\b"
    r"|^\W*(?:unknown|no\s+idea|no\s+answer|not\s+sure)\W*$|^\s*\?+\s*$",
    re.IGNORECASE,
)


def abstains(answer: str) -> bool:
    """Whether an answer says that it doesn't know, by English phrases; also one that is empty or a question mark."""
    plain = answer.replace("’", "'")
    return not plain.strip() or ABSTAINS.search(plain) is not None


def outcome(answer: str, references: Iterable[str], match: Match = "exact") -> Outcome:
    """What an answer is. One that says it doesn't know has abstained, whatever it adds.

    Args:
        references: right answers.
        match: the whole answer is one of them (case, articles and punctuation left out), or contains one.
    """
    if abstains(answer):
        return "abstained"
    right = exact_match(answer, references) if match == "exact" else contains_answer(answer, references)
    return "right" if right else "wrong"
