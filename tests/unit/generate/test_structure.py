"""Structured output: what a random model writes is always one of the texts asked for, and others' tokens don't change."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch

pytest.importorskip("llguidance")

import luban
from luban import Sampling, Structure
from luban.core.errors import ConfigError
from luban.generate.token_mask import StructureCompiler, mask_logits


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return luban.load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def engine(model):
    return luban.Engine(model)


def random_schema(rng: random.Random, depth: int = 2) -> tuple[dict, object]:
    """A schema whose texts are bounded, and a function that says whether a value is allowed by it."""
    kind = rng.choice(["string", "boolean", "enum", "null", *(["object", "array"] if depth else [])])
    if kind == "string":
        most = rng.randrange(1, 6)
        return {"type": "string", "maxLength": most}, lambda v: isinstance(v, str) and len(v) <= most
    if kind == "boolean":
        return {"type": "boolean"}, lambda v: isinstance(v, bool)
    if kind == "null":
        return {"type": "null"}, lambda v: v is None
    if kind == "enum":
        options = [rng.choice(["a", "bé", 3, -2, None, True, "日本"]) for _ in range(3)]
        return {"enum": options}, lambda v: any(v == o and type(v) is type(o) for o in options)
    if kind == "array":
        inner, fits = random_schema(rng, depth - 1)
        least, most = 1, rng.randrange(1, 4)
        return (
            {"type": "array", "items": inner, "minItems": least, "maxItems": most},
            lambda v: isinstance(v, list) and least <= len(v) <= most and all(map(fits, v)),
        )
    parts = {name: random_schema(rng, depth - 1) for name in ("x", "y z", "ü")[: rng.randrange(1, 4)]}
    schema = {
        "type": "object",
        "properties": {name: part for name, (part, _) in parts.items()},
        "required": list(parts),
        "additionalProperties": False,
    }
    return schema, lambda v: isinstance(v, dict) and set(v) == set(parts) and all(parts[n][1](v[n]) for n in parts)


def test_texts_are_what_random_schemas_allow(engine):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(5):
        schema, fits = random_schema(rng)
        sampling = Sampling(max_tokens=400, temperature=1.5, structure=Structure.json_schema(schema), n=2)
        (result,) = engine.generate("q", sampling)
        for choice in result.choices:
            assert choice.finish_reason == "stop", (seed, schema, choice.text)
            assert fits(json.loads(choice.text)), (seed, schema, choice.text)


@pytest.mark.parametrize("paged", [True, False])
def test_expressions_choices_and_grammars(model, paged):
    engine = luban.Engine(model, paged=paged)
    pattern = r"[a-f]{2,5}-([0-9]{2}|x)+é"
    lark = 'start: "(" start ")" | LETTER\nLETTER: /[xy]/'
    kinds = [
        (Structure.regex(pattern), lambda t: re.fullmatch(pattern, t)),
        (Structure.choice(["yes", "no", 'quo"te', "né\n"]), lambda t: t in ("yes", "no", 'quo"te', "né\n")),
        (Structure.grammar(lark), lambda t: re.fullmatch(r"(\(*)[xy](\)*)", t) and t.count("(") == t.count(")")),
        (Structure.json_object(), lambda t: isinstance(json.loads(t), dict)),
    ]
    for structure, fits in kinds:
        for seed in range(1):
            (result,) = engine.generate("q", Sampling(max_tokens=60, seed=seed, temperature=1.0, structure=structure))
            assert result.finish_reason == "length" or fits(result.text), (structure, result.text)
            assert result.finish_reason == "stop" or structure.kind != "grammar" or "(" in result.text


def test_requests_that_ask_for_nothing_get_the_tokens_they_get_alone(engine):
    plain = [Sampling(max_tokens=20, seed=i, ignore_eos=True, logprobs=2) for i in range(3)]
    masked = Sampling(max_tokens=20, seed=1, structure=Structure.regex("[ab]{9}"))
    alone = [engine.generate("pq", sampling)[0] for sampling in plain]
    requests = [engine.request("pq", sampling) for sampling in (plain[0], masked, plain[1], masked, plain[2])]
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    for request, want in zip(requests[::2], alone, strict=True):
        assert request.result.token_ids == want.token_ids
    assert all(re.fullmatch("[ab]{9}", requests[i].result.text) for i in (1, 3))


def test_logits_without_a_structure_are_the_same_tensor_and_others_rows_are_equal(model):
    compiler = StructureCompiler(model.tokenizer, model.spec.vocab_size, model.stop_ids)
    logits = torch.randn(3, model.spec.vocab_size)
    assert mask_logits(logits, [None] * 3) is logits
    matcher = compiler.matcher(Structure.choice(["ab", "c"]))
    masked = mask_logits(logits, [None, matcher, None])
    assert torch.equal(masked[[0, 2]], logits[[0, 2]])
    (a,), (b,), (c,) = (model.tokenizer.encode(letter) for letter in "abc")
    assert masked[1].isfinite().nonzero().flatten().tolist() == sorted((a, c))
    assert torch.equal(masked[1, [a, c]], logits[1, [a, c]])
    other = matcher.copy()
    assert matcher.consume(a) and not matcher.finished and matcher.consume(b) and matcher.finished
    assert other.consume(c) and other.finished
    assert not compiler.matcher(Structure.choice(["a"])).consume(c)


def test_masks_of_many_texts_are_those_of_each(model):
    compiler = StructureCompiler(model.tokenizer, model.spec.vocab_size, model.stop_ids)
    made = [compiler.matcher(Structure.regex(f"[{letter}-z]+")) for letter in "abcdefghij"]
    logits = torch.randn(len(made), model.spec.vocab_size)
    together = mask_logits(logits, made)
    for row, matcher in enumerate(made):
        assert torch.equal(mask_logits(logits[row : row + 1], [matcher])[0], together[row])
        assert together[row].isfinite().sum() == 26 - row


def test_a_matcher_takes_tokens_back(model):
    compiler = StructureCompiler(model.tokenizer, model.spec.vocab_size, model.stop_ids)
    matcher = compiler.matcher(Structure.regex("abc|abd"))
    a, b, c, d = (model.tokenizer.encode(letter)[0] for letter in "abcd")
    assert all(map(matcher.consume, (a, b, c))) and matcher.finished
    matcher.take_back(1)
    assert not matcher.finished and matcher.consume(d) and matcher.finished


def test_a_model_without_end_tokens_ends_where_nothing_can_follow(model):
    compiler = StructureCompiler(model.tokenizer, model.spec.vocab_size, ())
    matcher = compiler.matcher(Structure.choice(["a", "ab"]))
    a, b = (model.tokenizer.encode(letter)[0] for letter in "ab")
    logits = torch.zeros(1, model.spec.vocab_size)
    assert matcher.consume(a) and not matcher.finished
    assert mask_logits(logits, [matcher])[0].isfinite().nonzero().flatten().tolist() == [b]
    assert matcher.consume(b) and matcher.finished


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Structure.json_schema({"type": "objekt"}), "json schema can't be followed: Invalid type: objekt"),
        (lambda: Structure.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (lambda: Structure.json_schema("{"), "is not JSON"),
        (lambda: Structure.json_schema([1]), "a JSON schema is an object"),
        (lambda: Structure.json_schema({"enum": [object()]}), "can't be written as JSON"),
        (lambda: Structure.regex("a("), "the regex can't be followed: unclosed group, at character 2: ("),
        (lambda: Structure.regex("(?i"), "expected flag but got end of regex, at its end"),
        (lambda: Structure.regex("x" * 99 + "[b-a]" + "y" * 99), "character 101: b-a]yyyyyyyyyyyyyyyy…"),
        (lambda: Structure.regex("a\n/("), "the regex can't be followed: unclosed group, at ("),
        (lambda: Structure.regex(r"\bfoo"), r"followed: the assertion \b is not supported inside of a regex"),
        (lambda: Structure.regex("a$b"), "the assertion $ is not supported inside of a regex"),
        (lambda: Structure.regex(r"(?<=a)b"), "look-behind, is not supported, at character 1: (?<=a)b"),
        (lambda: Structure.regex(r"[^\s\S]"), "the regex can't be followed: it allows no text"),
        (
            lambda: Structure.json_schema({"type": "string", "pattern": "("}),
            "followed: in a regex, unclosed group, at (",
        ),
        (lambda: Structure.grammar('start: X\nX: "a" /[b/'), "line 2, column 4: in a regex, unclosed character class"),
        (lambda: Structure.grammar('start: "a'), "the grammar can't be followed: line 1, column"),
        (lambda: Structure.regex(""), "non-empty"),
        (lambda: Structure.choice([]), "a choice needs"),
        (lambda: Structure.choice(["a", ""]), "a choice needs"),
        (lambda: Structure.grammar("start: nowhere"), "unknown name"),
        (lambda: Structure.grammar("start: start"), "the grammar can't be followed: it allows no text"),
        (lambda: Structure.json_schema(False), "can't be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(engine, make, words):
    with pytest.raises(ConfigError) as refused:
        engine.generate("q", Sampling(structure=make()))
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not engine.running and not engine.waiting


def test_another_thing_than_a_structure_is_refused():
    with pytest.raises(ConfigError, match=r"structure must be a luban\.Structure"):
        Sampling(structure={"type": "object"})
