"""Conversation → tokens: what is trained on, and what no text can do."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luban.core.errors import DataError
from luban.tokenizer.chat import render
from luban.tokenizer.special import SPECIAL_TOKENS
from luban.tokenizer.tokenizer import load_tokenizer

CONTENT = st.lists(st.one_of(st.text(), st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "<", ">", "end|>", " ", "\n"])))
relaxed = settings(max_examples=200)


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@relaxed
@given(contents=st.lists(CONTENT.map("".join), min_size=1, max_size=6), system=st.none() | CONTENT.map("".join))
def test_only_the_template_writes_special_tokens(bpe, contents, system):
    """The skeleton of special tokens depends on the roles alone, and what is between them is what people wrote."""
    messages = ([] if system is None else [{"role": "system", "content": system}]) + turns(*contents)
    rendered = render(messages, bpe)
    specials = [i for i in rendered.token_ids if i in bpe.special.values()]
    expected = [bpe.bos_id]
    for message in messages:
        expected += [bpe.special[f"<|{message['role']}|>"], bpe.special["<|end|>"]]
    assert specials == expected
    assert bpe.decode(rendered.token_ids) == "".join(message["content"] for message in messages)


@relaxed
@given(contents=st.lists(CONTENT.map("".join), min_size=1, max_size=6))
def test_the_mask_is_the_answers_and_one_end_token_each(bpe, contents):
    messages = turns(*contents)
    rendered = render(messages, bpe)
    end = bpe.special["<|end|>"]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    trained = [i for i, on in zip(rendered.token_ids, rendered.loss_mask, strict=True) if on]
    assert bpe.decode(trained) == "".join(answers)
    assert trained.count(end) == len(answers)
    assert bpe.eos_id not in rendered.token_ids
    for span in rendered.spans:
        if span.trained:
            assert rendered.token_ids[span.stop - 1] == end
            assert rendered.token_ids[span.start - 1] == bpe.special["<|assistant|>"]


@relaxed
@given(contents=st.lists(CONTENT.map("".join), min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_the_prompt_of_serving_is_the_beginning_of_training(bpe, contents):
    messages = turns(*contents)
    prompt = render(messages[:-1], bpe, add_generation_prompt=True).token_ids
    whole = render(messages, bpe).token_ids
    assert whole[: len(prompt)] == prompt
    assert bpe.decode(whole[len(prompt) :]) == contents[-1]


def test_answers_of_weight_0_are_read_and_not_trained_on(bpe, tmp_path):
    messages = turns("q0", "a0", "q1", "a1", "q2", "a2")
    searched = with_template(bpe, FOREIGN, tmp_path / "hf")
    for tokenizer, weights in itertools.product((bpe, searched), itertools.product((None, 0, 1), repeat=3)):
        given = {2 * i + 1: {"weight": weight} for i, weight in enumerate(weights) if weight is not None}
        plain = render(messages, tokenizer)
        weighed = render([{**message, **given.get(i, {})} for i, message in enumerate(messages)], tokenizer)
        assert weighed.token_ids == plain.token_ids
        answers = [span for span in plain.spans if span.trained]
        kept = [span for span, weight in zip(answers, weights, strict=True) if weight != 0]
        assert [span for span in weighed.spans if span.trained] == kept


def test_spans_cover_the_conversation(bpe):
    rendered = render([{"role": "system", "content": "s"}, *turns("a", "b", "c", "d", "e")], bpe)
    assert [(s.role, s.trained) for s in rendered.spans] == [
        ("system+user", False),
        ("assistant", True),
        ("user", False),
        ("assistant", True),
        ("user", False),
    ]
    assert [s.start for s in rendered.spans[1:]] == [s.stop for s in rendered.spans[:-1]]
    assert rendered.spans[0].start == 0 and rendered.spans[-1].stop == len(rendered.token_ids)


@pytest.mark.parametrize(
    "messages, words",
    [
        ([], "at least one message"),
        ([{"role": "end", "content": "x"}], "unknown role 'end'"),
        ([{"content": "x"}], "unknown role None"),
        ([{"role": "user"}], "no content"),
        ([{"role": "tool", "content": "x"}], "roles system, user and assistant"),
        (["hello"], "unknown role"),
    ],
)
def test_bad_conversations_are_refused(bpe, messages, words):
    with pytest.raises(DataError, match=words):
        render(messages, bpe)


FOREIGN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}{% else %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)


def with_template(tokenizer, template, folder):
    """A Hugging Face directory: no manifest, the template inside tokenizer_config.json."""
    folder.mkdir()
    shutil.copy(tokenizer.path / "tokenizer.json", folder)
    config = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|eos|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 6, 9]}))
    return load_tokenizer(folder)


LINES = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_an_answer_begins_with_a_token_of_its_own(bpe, tmp_path):
    """Two line ends are one token of this vocabulary, which an answer's first must not make with the prompt's last: a model
    that writes the answer has read the prompt before."""
    tokenizer, words = with_template(bpe, LINES, tmp_path / "hf"), st.text("\n a<|end>", max_size=8)
    joined = "x\n\n y"
    assert len(tokenizer.encode(joined)) < len(joined), "the vocabulary joins line ends, or nothing is tested"

    @relaxed
    @given(contents=st.lists(words, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
    def holds(contents):
        messages = turns(*contents)
        rendered = render(messages, tokenizer)
        for turn in range(1, len(messages), 2):
            prompt = render(messages[:turn], tokenizer, add_generation_prompt=True).token_ids
            assert rendered.token_ids[: len(prompt)] == prompt
            answer = next(s for s in rendered.spans if s.trained and s.start >= len(prompt))
            assert answer.start == len(prompt)
            assert tokenizer.decode(rendered.token_ids[answer.start : answer.stop]) == contents[turn]
        assert tokenizer.decode(rendered.token_ids) == "".join(f"\n{content}\n" for content in contents)

    holds()


def test_a_template_without_assistant_spans_is_searched_for_them(bpe, tmp_path):
    tokenizer = with_template(bpe, FOREIGN, tmp_path / "hf")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (0, 1, None, (1, 6, 9))
    rendered = render(turns(" hi ", "<|end|> yes"), tokenizer)
    assert (
        tokenizer.decode(rendered.token_ids, skip_special=False) == "<|user|>hi<|end|><|assistant|><|end|> yes<|end|>"
    )
    assert [i for i in rendered.token_ids if i == 6] == [6, 6]
    trained = [i for i, on in zip(rendered.token_ids, rendered.loss_mask, strict=True) if on]
    # the template has no generation prompt, so whoever answers writes the role as well
    assert tokenizer.decode(trained, skip_special=False) == "<|assistant|><|end|> yes<|end|>" and trained[-1] == 6


def test_a_prompt_needs_no_assistant_span(bpe, tmp_path):
    tokenizer = with_template(bpe, FOREIGN, tmp_path / "hf")
    assert not any(render(turns("hi"), tokenizer).loss_mask)


def test_named_templates_and_marked_ones(bpe, tmp_path):
    tokenizer = with_template(
        bpe, [{"name": "tool", "template": "x"}, {"name": "default", "template": MARKED}], tmp_path / "hf"
    )
    rendered = render(turns("q", "a"), tokenizer)
    trained = [i for i, on in zip(rendered.token_ids, rendered.loss_mask, strict=True) if on]
    assert tokenizer.decode(trained, skip_special=False) == "a<|end|>"


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for m in %}", "not valid Jinja"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ messages[0].missing.attribute }}", "refuses"),
    ],
)
def test_templates_that_fail_say_so_in_one_line(bpe, tmp_path, template, words):
    tokenizer = with_template(bpe, template, tmp_path / "hf")
    with pytest.raises(DataError, match=words):
        render(turns("q"), tokenizer)


def test_a_tokenizer_without_template_says_so(bpe, tmp_path):
    tokenizer = with_template(bpe, None, tmp_path / "hf")
    with pytest.raises(DataError, match="no chat template"):
        render(turns("q"), tokenizer)


@pytest.mark.parametrize(
    "template, content",
    [
        ("<{{ m['content'] }}>", "|end|"),
        ("<{{ m['content'] }}", "|end|>"),
        ("{{ m['content'] }}>", "<|end|"),
        ("<{{ m['content'] | trim }}>", " \n|end|\t"),
        ("{{ m['content'] | trim }}>", "x <|end| "),
        ("{{ m['content'][1:] }}", " <|end|>"),
        ("{{ m['content'] + m['content'] }}", "nd|><|e"),
    ],
)
def test_a_special_token_cannot_be_spelled_together_with_the_template(bpe, tmp_path, template, content):
    tokenizer = with_template(bpe, "{% for m in messages %}" + template + "{% endfor %}", tmp_path / "hf")
    rendered = render([{"role": "user", "content": content}], tokenizer)
    text = tokenizer.decode(rendered.token_ids, skip_special=False)
    assert "<|end|>" in text
    assert 6 not in rendered.token_ids
