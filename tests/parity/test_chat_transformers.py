"""Chat rendering beside `transformers.apply_chat_template`, on templates of the shapes that are in use."""

from __future__ import annotations

import random

import pytest

from luban.tokenizer.chat import render
from luban.tokenizer.train import train_tokenizer

transformers = pytest.importorskip("transformers")

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|user|>' + message['role'] + '<|system|>\n\n'+ message['content'] | trim + '<|end|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant<|system|>\n\n' }}{% endif %}"
)
CHATML = (
    "{%- for message in messages %}\n    {%- if message.role == 'assistant' %}\n"
    "        {{- '<|user|>assistant\n' }}{% generation %}{{- message.content + '<|end|>' }}{% endgeneration %}{{- '\n' }}\n"
    "    {%- else %}\n        {{- '<|user|>' + message.role + '\n' + message.content + '<|end|>' + '\n' }}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|user|>assistant\n' }}\n{%- endif %}\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tok") / "t"
    rng = random.Random(3)
    words = [
        "the",
        "user",
        "asks",
        "what",
        "it",
        "is",
        "and",
        "the",
        "assistant",
        "answers",
        "with",
        "a",
        "word",
        ",",
        "42",
        "\n\n",
        "你好",
        "é",
    ]
    train_tokenizer([" ".join(rng.choices(words, k=20)) for _ in range(300)], path, vocab_size=380)
    return path


def conversations(seed):
    rng = random.Random(seed)
    words = ["hello", "  two", "\n\nlines", "你好", "é!", "1234", " ", "x\t", "> quoted", "a < b", "ünï"]
    for length in range(1, 7):
        contents = ["".join(rng.choices(words, k=rng.randint(0, 6))) for _ in range(length)]
        yield [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize("template", [None, LLAMA3, CHATML], ids=["luban", "llama3", "chatml"])
@pytest.mark.parametrize("prompt", [False, True])
def test_ids_and_masks_are_those_of_transformers(folder, template, prompt, tmp_path):
    import shutil

    from luban.tokenizer.tokenizer import load_tokenizer

    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / file, tmp_path)
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for messages in conversations(seed=11):
        marked = template != LLAMA3
        expected = theirs.apply_chat_template(
            messages, return_dict=True, add_generation_prompt=prompt, return_assistant_tokens_mask=marked
        )
        found = render(messages, ours, add_generation_prompt=prompt)
        assert found.token_ids == expected["input_ids"]
        if marked:
            assert found.loss_mask == [bool(on) for on in expected["assistant_masks"]]


def test_a_trained_tokenizer_is_read_by_transformers(folder):
    from luban.tokenizer.tokenizer import load_tokenizer

    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert len(theirs) == ours.vocab_size
    for text in ("hello 你好\n\n  x", "  lead", "1234567", "é\u0301"):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
