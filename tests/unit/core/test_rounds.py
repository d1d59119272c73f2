"""Lists of bounded size hold everything once and in order."""

from __future__ import annotations

import random

from luban.core.rounds import rounds


def test_rounds_keep_order_and_end_with_the_item_that_fills_them():
    items = [random.randint(0, 9) for _ in range(random.randint(1, 200))]
    found = list(rounds(items, lambda n: n, 20))
    assert [n for each in found for n in each] == items
    assert all(sum(each) >= 20 and sum(each[:-1]) < 20 for each in found[:-1]) and found[-1]
    assert list(rounds([], len, 1)) == []
