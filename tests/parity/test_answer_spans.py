"""Answers found in templates as they are published, beside transformers' mask of the same templates with their answers marked."""

from __future__ import annotations

import random

import pytest
from chat_families import FAMILIES

from luban.tokenizer.chat import render
from luban.tokenizer.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")
WORDS = [
    "yes",
    "no",
    "ok",
    " a",
    "  two",
    "\n\nlines",
    "你好",
    "é!",
    " ",
    "x\t",
    "<|im_end|>",
    "</s>",
    "<|",
    "|>",
    "[INST]",
    "<end_of_turn>",
    "<｜Assistant｜>",
    "<|user|>",
    "assistant",
    "a < b",
    "{",
    '"',
    "USER:",
    "\n",
]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    """(the family, the published form's vocabulary here, the marked form's in transformers)."""
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("family")
    plain = load_tokenizer(family.write(folder / "plain", family.plain))
    return family, plain, transformers.AutoTokenizer.from_pretrained(family.write(folder / "marked", family.template))


def words(draw: random.Random) -> str:
    return "".join(draw.choices(WORDS, k=draw.randint(0, 6)))


def conversation(draw: random.Random, calls: bool) -> list[dict]:
    """Turns of user and assistant, at times with a system turn, empty turns, thinking, repeated words and tool turns."""
    messages = [{"role": "system", "content": "Be brief. " + words(draw)}] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": "q" + words(draw)})
        if calls and draw.random() < 0.4:
            arguments = {"zone": words(draw), "n": [1, words(draw)]}
            call = {"id": "abcdefghi", "type": "function", "function": {"name": "get_time", "arguments": arguments}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": "abcdefghi", "content": "12:00" + words(draw)})
        answer = {"role": "assistant", "content": words(draw)}
        if draw.random() < 0.3:
            answer["content"] = f"<think>\nhm {draw.choice(WORDS)}\n</think>\n\n" + answer["content"]
        elif draw.random() < 0.3:
            answer["reasoning_content"] = "hm " + draw.choice(["yes", "你好"])
        messages.append(answer)
    return messages


@pytest.mark.parametrize("seed", range(30))
def test_found_answers_are_those_that_marks_would_say(family, seed):
    kind, ours, theirs = family
    messages = conversation(random.Random(seed), kind.calls)
    # what people write can't become a special token here, and does in transformers: there it is broken up beforehand
    broken = [_without(message, ours.special) for message in messages]
    marked = theirs.apply_chat_template(broken, return_dict=True, return_assistant_tokens_mask=True)
    found = render(broken, ours)
    if not any(message["role"] == "assistant" and (message["content"] or "")[:1].isspace() for message in broken):
        assert found.token_ids == marked["input_ids"]
        assert found.loss_mask == [bool(on) for on in marked["assistant_masks"]]
    else:  # transformers makes one token of the prompt's end and the answer's beginning, which no model reads or writes
        assert ours.decode(found.token_ids, skip_special=False) == theirs.decode(marked["input_ids"])
        for turn, message in enumerate(broken):
            if message["role"] == "assistant":
                prompt = render(broken[:turn], ours, add_generation_prompt=True).token_ids
                text = ours.decode(prompt, skip_special=False)
                if (message["content"] or "")[:1].isspace() and theirs.decode(marked["input_ids"]).startswith(text):
                    ends = range(len(prompt) - 2, len(found.token_ids))
                    assert any(ours.decode(found.token_ids[:end], skip_special=False) == text for end in ends)
    # and with its special tokens spelled out as text, the same tokens are trained on apart from those words
    spelled = render(messages, ours)
    assert sum(span.trained for span in spelled.spans) == sum(message["role"] == "assistant" for message in messages)
    ends = [spelled.token_ids[span.stop - 1] for span in spelled.spans if span.trained]
    assert ends == [found.token_ids[span.stop - 1] for span in found.spans if span.trained]


def _without(value, specials):
    if isinstance(value, dict):
        return {key: _without(item, specials) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item, specials) for item in value]
    if isinstance(value, str):
        for special in specials:
            value = value.replace(special, "·")
    return value
