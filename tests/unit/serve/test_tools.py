"""Calls of tools: what families' templates write is read back, whole and in any pieces; a required call is always one."""

from __future__ import annotations

import json
import random

import chat_families
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("llguidance")

from fastapi.testclient import TestClient

import luban
from luban.core.errors import DataError
from luban.generate.text import TextStream
from luban.generate.token_mask import Matcher, StructureCompiler
from luban.serve.api.app import create_app
from luban.serve.api.tool_formats import Hermes, Llama3, Mistral, ToolParser, format_of
from luban.tokenizer.chat import render
from luban.tokenizer.tokenizer import load_tokenizer

FAMILIES = {
    "hermes": (chat_families.QWEN3, Hermes, ("<|im_start|>", "<|im_end|>")),
    "llama3": (
        chat_families.LLAMA3,
        Llama3,
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"),
    ),
    "mistral": (chat_families.MISTRAL, Mistral, ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]")),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string", "maxLength": 4}, "all": {"type": "boolean"}},
                "required": ["query", "all"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """(tokenizer, its format's class)."""
    template, form, specials = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "tokenizer"
    made = chat_families.Family(template, specials, calls=True)
    return load_tokenizer(made.write(folder, made.plain)), form


def written(tokenizer, calls) -> list[int]:
    """Tokens of the template's turn with calls."""
    user = {"role": "user", "content": "go"}
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    whole = render([user, turn], tokenizer).token_ids
    return whole[len(render([user], tokenizer, add_generation_prompt=True).token_ids) :]


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_template_writes_is_read_back_in_any_pieces(family, count):
    tokenizer, expected = family
    form = format_of(tokenizer)
    assert type(form) is expected
    arguments = [{"query": 'a "b" {é}\n</tool', "n": [1, {"x": None}]}, {}][:count]
    calls = [
        {"type": "function", "function": {"name": f"f_{i}", "arguments": json.dumps(a)}}
        for i, a in enumerate(arguments)
    ]
    if expected is Llama3:
        calls, arguments = calls[:1], arguments[:1]
    ids = [token for token in written(tokenizer, calls) if token not in tokenizer.stop_ids]
    stream = TextStream(tokenizer, kept=form.kept())
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    for parts in (pieces, ["".join(pieces)]):
        parser, text, found = ToolParser(form), "", []
        for piece in parts:
            more, new = parser.push(piece)
            text, found = text + more, found + new
        rest, new = parser.finish()
        assert (text + rest).strip() in ("", "<think>\n\n</think>")
        assert [(c.name, json.loads(c.arguments)) for c in found + new] == [
            (f"f_{i}", a) for i, a in enumerate(arguments)
        ]
        assert len({c.id for c in parser.calls}) == len(arguments) and all(len(c.id) == 9 for c in parser.calls)


@pytest.mark.parametrize(
    ("form", "text", "content", "names"),
    [
        (Hermes, 'I look.\n<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>', "I look.\n", ["a"]),
        (Hermes, "1 < 2 <tool", "1 < 2 <tool", []),
        (Hermes, "<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
        (Hermes, '<tool_call>{"name": "a", "arguments": {"x": 1}}', "", ["a"]),
        (Llama3, '<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}', "", ["a", "b"]),
        (Llama3, '{"answer": 3}', '{"answer": 3}', []),
        (Llama3, 'See {"name": "a", "parameters": {}}', 'See {"name": "a", "parameters": {}}', []),
        (Mistral, '[TOOL_CALLS][{"name": "a", "arguments": {"k": "[TOOL]"}}]', "", ["a"]),
        (Mistral, '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[CALL_ID]q1w2e3r4t[ARGS]{}', "", ["a", "b"]),
        (Mistral, "[TOOL", "[TOOL", []),
    ],
)
def test_texts_around_calls_are_kept_and_what_is_no_call_stays_text(form, text, content, names):
    for _ in range(5):
        parser, shown, at = ToolParser(form(None)), "", 0
        while at < len(text):
            size = random.randrange(1, 9)
            shown += parser.push(text[at : at + size])[0]
            at += size
        assert shown + parser.finish()[0] == content and [call.name for call in parser.calls] == names


@pytest.mark.parametrize(
    ("arguments", "name", "fine"),
    [
        ({"query": "ab", "all": True}, "find", True),
        ({"query": "ab", "all": 1}, "find", False),
        ({"query": "ab"}, "find", False),
        ({"query": "ab", "all": True}, "lost", False),
    ],
)
def test_answers_in_words_or_by_calls_keep_schemas(family, arguments, name, fine):
    tokenizer, _ = family
    form = format_of(tokenizer)
    functions = [(tool["function"]["name"], tool["function"].get("parameters")) for tool in TOOLS]
    compiler = StructureCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)

    def taken(ids, structure) -> bool:
        matcher = compiler.matcher(structure)
        ends = (tokenizer.stop_ids[0],) if not ids or ids[-1] not in tokenizer.stop_ids else ()
        return all(matcher.consume(token) for token in (*ids, *ends))

    calls = [{"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}]
    ids = written(tokenizer, calls)
    ids = ids[: next(i for i, token in enumerate(ids) if token in tokenizer.stop_ids)]
    if form.only_at_start:  # without the end of the prompt, which merges with line ends
        ids = tokenizer.encode_marked(tokenizer.decode(ids, skip_special=False).lstrip())[0]
    words = tokenizer.encode("Good { day <tool> [x]")
    assert taken(ids, form.text_or_calls(functions)) == fine and not taken(ids, form.text_alone())
    assert taken(words, form.text_or_calls(functions)) and taken(words, form.text_alone())


def test_required_calls_are_of_the_named_function_and_its_schema(family):
    """By a random walk over the tokens that the grammar allows."""
    import torch

    tokenizer, _ = family
    form = format_of(tokenizer)
    functions = [(tool["function"]["name"], tool["function"].get("parameters")) for tool in TOOLS]
    compiler, rng = StructureCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids), random.Random()
    for offered in (functions, functions[:1]):
        matcher = compiler.matcher(form.structure(offered, several=len(offered) > 1))
        stream, text = TextStream(tokenizer, kept=form.kept()), ""
        words = torch.zeros(1, matcher.words, dtype=torch.int32)
        bits = torch.arange(32)
        for _ in range(400):
            Matcher.write_masks([matcher], words)
            allowed = (words[0, :, None] >> bits & 1).flatten().nonzero().flatten().tolist()
            ends = [token for token in allowed if token in tokenizer.stop_ids]
            close = [t for t in allowed if tokenizer.token_bytes(t) in (b'"', b"}", b"]", b"<")]
            token = rng.choice(ends or close or allowed)
            if token in tokenizer.stop_ids or matcher.finished:
                break
            assert matcher.consume(token)
            text += stream.push(token)
        parser = ToolParser(form)
        parser.push(text + stream.finish())
        parser.finish()
        assert parser.calls and {call.name for call in parser.calls} <= {name for name, _ in offered}, text
        for call in parser.calls:
            if call.name == "find":
                assert {type(v) for v in json.loads(call.arguments).values()} == {str, bool}


def test_a_template_of_an_unknown_format_is_refused(tiny_checkpoint):
    with pytest.raises(DataError, match="known format"):
        format_of(load_tokenizer(tiny_checkpoint))


TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }} <tool_call><|end|>{% endif %}{% for m in messages %}"
    "{{ '<|user|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def client(tiny_checkpoint, monkeypatch):
    engine = luban.Engine(luban.load_model(tiny_checkpoint))
    monkeypatch.setattr(engine.model.tokenizer, "chat_template", TEMPLATE)
    with TestClient(create_app(engine), base_url="http://localhost") as client:
        yield client


def ask(client, **fields):
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "max_tokens": 300, "seed": 3, **fields}
    return client.post("/v1/chat/completions", json=body)


NAMED = {"type": "function", "function": {"name": "find"}}


def test_a_required_call_is_answered_whole_and_streamed(client):
    (choice,) = ask(client, tool_choice=NAMED).json()["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "find"
    arguments = json.loads(call["function"]["arguments"])
    assert isinstance(arguments["all"], bool) and len(arguments["query"]) <= 4
    lines = [line for line in ask(client, tool_choice=NAMED, stream=True).text.split("\n\n") if line]
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    (delta,) = [c["delta"]["tool_calls"] for c in chunks if "tool_calls" in c["delta"]]
    assert delta[0]["index"] == 0 and delta[0]["function"] == call["function"]
    assert chunks[-1]["finish_reason"] == "tool_calls" and not any(c["delta"].get("content") for c in chunks)


def test_without_a_choice_the_model_may_answer_and_none_hides_the_tools(client):
    usage = {choice: ask(client, tool_choice=choice, max_tokens=2).json()["usage"] for choice in ("auto", "none")}
    assert usage["auto"]["prompt_tokens"] > usage["none"]["prompt_tokens"] + 50
    cut = ask(client, tool_choice="required", max_tokens=14).json()["choices"][0]
    assert cut["finish_reason"] == "length" and cut["message"]["content"].startswith("<tool_call>")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "lost"}}}, "none of the tools (find, now)"),
        ({"tools": [], "tool_choice": "required"}, "'tools' names none"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"response_format": {"type": "json_object"}}, "'tools' together with"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "x"}}}],
                "tool_choice": "required",
            },
            "Invalid type",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "strict": True, "parameters": {"type": "x"}}}]},
            "Invalid type",
        ),
    ],
)
def test_tools_that_cannot_be_are_named(client, fields, words):
    answer = ask(client, **fields)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
