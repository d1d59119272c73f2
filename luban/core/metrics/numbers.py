"""The final number of a worked answer, as in GSM8K (Cobbe et al. 2021)."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> Decimal | None:
    """The number behind the last `####`, as in GSM8K, else the last number of the text."""
    marked = text.rpartition("####")[2] if "####" in text else text
    found = NUMBER.findall(marked)
    if not found:
        return None
    try:
        return Decimal((found[0] if "####" in text else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None
