"""Which replica a request goes to."""

from __future__ import annotations

import json
import random

import pytest

from luban.core.errors import UsageError
from luban.serve.replicas.process import environments
from luban.serve.replicas.routing import CHUNK, UNEVEN, Router, text_of


def body(*messages: str, model: str = "m") -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": m} for m in messages]}).encode()


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(["one", "two", "three", "four", "five"]) for _ in range(count))


def test_a_conversation_stays_where_its_prefix_was_read():
    router, ready = Router(4), {0: "", 1: "", 2: "", 3: ""}
    places = []
    for number in range(12):
        told = [words(number, 200)]
        first = router.choose(text_of(body(*told)), ready)
        router.begin(first, text_of(body(*told)))
        for turn in range(3):
            told.append(words(1000 * number + turn, 40))
            assert router.choose(text_of(body(*told)), ready) == first
        places.append(first)
    assert sorted(places.count(replica) for replica in range(4)) == [3, 3, 3, 3]  # and others are spread evenly


def test_the_longest_prefix_counts_and_another_model_is_another_prefix():
    router, common = Router(2), "x" * 3 * CHUNK
    router.begin(0, text_of(body(common + "a" * 2 * CHUNK)))
    router.begin(1, text_of(body(common + "b" * 2 * CHUNK)))
    ready = [0, 1]
    assert router.choose(text_of(body(common + "a" * 3 * CHUNK)), ready) == 0
    assert router.choose(text_of(body(common + "b" * 3 * CHUNK)), ready) == 1
    router.end(1)
    assert router.choose(text_of(body(common + "a" * 3 * CHUNK, model="other")), ready) == 1  # the one with less to do


def test_a_busy_replica_hands_over_and_one_that_is_gone_is_not_chosen():
    router, text = Router(3), text_of(body(words(1, 300)))
    for _ in range(UNEVEN + 1):
        router.begin(0, text)
    assert router.choose(text, [0, 1, 2]) == 1
    router.end(0)
    assert router.choose(text, [0, 1, 2]) == 0
    assert router.choose(text, [1, 2]) == 1
    router.forget(0)
    assert router.choose(text, [0, 1, 2]) == 1


def test_bodies_that_are_no_requests_have_no_prefix():
    for wrong in (b"", b"{", b"[1]", b'"x"', b"\xff\xfe"):
        assert text_of(wrong) == ""
    assert Router(2).choose("", [1]) == 1
    assert text_of(json.dumps({"prompt": "abc"}).encode()).endswith("abc")
    assert text_of(json.dumps({"input": ["a", "b"], "model": 3}).encode()) == "3\0ab"


def test_gpus_of_replicas(monkeypatch):
    """Those that may be seen, so many for each."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")

    def seen(count: int, gpus: int) -> list[str]:
        made = environments(count, device="cuda", gpus=gpus, key="k")
        return [each["CUDA_VISIBLE_DEVICES"] for each in made]

    assert seen(3, 1) == ["4", "5", "6"] and seen(2, 2) == ["4,5", "6,7"]
    with pytest.raises(UsageError, match="3 needs 6 GPUs, and there are 5: use --replicas 2"):
        seen(3, 2)
    with pytest.raises(UsageError, match=r"there are 5$"):
        seen(1, 6)
