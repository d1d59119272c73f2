"""What is trained on in a conversation, found in templates that don't mark it: right values, written out."""

from __future__ import annotations

import pytest
from chat_families import ALTERNATE, CHATML, FAMILIES, GLM, Family

from luban.core.errors import DataError
from luban.tokenizer.chat import render
from luban.tokenizer.tokenizer import load_tokenizer

CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "get_time", "arguments": {"zone": "UTC"}}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "12:00"}


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture
def trained(tmp_path):
    """`trained(family, messages)`: the texts of the trained spans."""

    def texts(family: Family, messages, **options) -> list[str]:
        tokenizer = load_tokenizer(family.write(tmp_path / "family", family.plain))
        rendered = render(messages, tokenizer, **options)
        assert [span.start for span in rendered.spans[1:]] == [span.stop for span in rendered.spans[:-1]]
        assert rendered.spans[0].start == 0 and rendered.spans[-1].stop == len(rendered.token_ids)
        spans = [span for span in rendered.spans if span.trained]
        assert {span.role for span in spans} <= {"assistant"}
        assert rendered.loss_mask.count(True) == sum(span.stop - span.start for span in spans)
        return [tokenizer.decode(rendered.token_ids[span.start : span.stop], skip_special=False) for span in spans]

    return texts


ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama2": " </s>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "qwen3": "<|im_end|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "phi3": "<|end|>",
    "gpt-oss": "<|end|>",
    "command-r": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "zephyr": "</s>",
    "vicuna": "</s>",
    "granite": "<|end_of_text|>",
}
STARTS = {
    "llama2": " ",
    "mistral": " ",
    "vicuna": " ",
    "gpt-oss": "<|channel|>final<|message|>",
    "command-r": "<|START_RESPONSE|>",
}
LAST = {"qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>"), "gpt-oss": ("<|channel|>final<|message|>", "<|return|>")}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_and_its_end_token_are_trained_on(trained, name):
    system = {"role": "system", "content": "Be brief."}
    start, end = STARTS.get(name, ""), ENDS[name]
    first, last = LAST.get(name, (start, end))
    for messages in (turns("one", "yes", "yes", "two"), [system, *turns("one", "yes", "yes", "two")]):
        assert trained(FAMILIES[name], messages) == [f"{start}yes{end}", f"{first}two{last}"]
    unfinished = [*turns("one", "yes", "two")]
    assert trained(FAMILIES[name], unfinished) == [f"{start}yes{end}"]
    assert trained(FAMILIES[name], unfinished, add_generation_prompt=True) == [f"{start}yes{end}"]
    assert trained(FAMILIES[name], turns("one")) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_answer_is_its_end_token(trained, name):
    start, end = STARTS.get(name, ""), ENDS[name]
    assert trained(FAMILIES[name], turns("one", "", "two", "ok"))[0] == f"{start}{end}"


CALLS = {
    "llama3": '{"name": "get_time", "parameters": {"zone": "UTC"}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "get_time", "arguments": {"zone": "UTC"}}]</s>',
    "gemma4": '<|tool_call>call:get_time{"zone": "UTC"}<tool_call|>',
    "qwen3": '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call><|im_end|>',
    "deepseek": '<｜tool▁call｜>get_time\n{"zone": "UTC"}<｜tool▁call▁end｜><｜end▁of▁sentence｜>',
    "gpt-oss": ' to=functions.get_time<|channel|>commentary<|message|>{"zone": "UTC"}<|call|>',
    "granite": '<|tool_call|>[{"name": "get_time", "arguments": {"zone": "UTC"}}]<|end_of_text|>',
}


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.calls])
def test_a_tool_call_is_trained_on_and_its_result_is_not(trained, name):
    call = CALL if name in ("llama3", "mistral", "qwen3", "deepseek", "gpt-oss") else {**CALL, "content": ""}
    found = trained(FAMILIES[name], [*turns("time?"), call, RESULT, *turns("x", "noon")[1:], *turns("thanks", "bye")])
    assert found[0] == CALLS[name]
    assert found[1].endswith("noon" + ENDS[name]) and "bye" in found[2] and len(found) == 3


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.calls])
def test_arguments_may_be_json_text_and_a_content_null_or_empty(trained, name):
    function = CALL["tool_calls"][0]["function"]
    spelled = {**CALL["tool_calls"][0], "function": {**function, "arguments": '{"zone": "UTC"}'}}
    for content in (None, ""):
        call = {"role": "assistant", "content": content, "tool_calls": [spelled]}
        assert trained(FAMILIES[name], [*turns("time?"), call, RESULT, *turns("x", "noon")[1:]])[0] == CALLS[name]


WRITES = {  # how a template writes calls → what it writes of a call with arguments as JSON text
    "{{ c.function.arguments }}": '{"zone": "UTC"}',
    "{{ '' + c.function.arguments }}": '{"zone": "UTC"}',
    "{{ c.function.arguments | tojson }}": '{"zone": "UTC"}',
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}": "zone=UTC",
}


@pytest.mark.parametrize("written", WRITES)
@pytest.mark.parametrize(
    "content",
    ["{{ m.content or '' }}", "{{ m.content | trim }}", "{% if m.content is not none %}{{ m.content }}|{% endif %}"],
    ids=["or", "trim", "turn"],
)
def test_templates_get_arguments_and_contents_as_they_want_them(trained, written, content):
    template = (
        f"{{% for m in messages %}}{{{{ m.role }}}}:{content}{{% for c in m.tool_calls or [] %}}{{{{ c.function.name }}}}"
        + written
        + "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    spelled = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    call = {"role": "assistant", "content": None, "tool_calls": [spelled]}
    (found,) = trained(Family(template, ("<s>", "</s>")), [*turns("time?"), call, RESULT])
    assert found == "now" + WRITES[written] + "</s>"


def test_tools_are_written_by_templates_that_have_a_place_for_them(tmp_path):
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tools = [{"type": "function", "function": {"name": "now </s>"}}]
    tokenizer = load_tokenizer(Family(template, ("<s>", "</s>")).write(tmp_path / "t", template))
    ids = render(turns("time?"), tokenizer, tools=tools).token_ids
    text = '[{"type": "function", "function": {"name": "now </s>"}}]time?</s>'
    assert tokenizer.decode(ids, skip_special=False) == text and ids.count(tokenizer.special["</s>"]) == 1
    chatml = load_tokenizer(FAMILIES["chatml"].write(tmp_path / "c", CHATML))
    with pytest.raises(DataError, match="no place for tools"):
        render(turns("time?"), chatml, tools=tools)
    assert render(turns("time?"), chatml, tools=[]).token_ids == render(turns("time?"), chatml).token_ids


def test_earlier_thinking_that_the_template_drops_is_not_trained_on(trained):
    thoughtful = [f"<think>\nhm {word}\n</think>\n\n{word}" for word in ("one", "two")]
    messages = turns("a", thoughtful[0], "b", thoughtful[1])
    assert trained(FAMILIES["qwen3"], messages) == ["one<|im_end|>", thoughtful[1] + "<|im_end|>"]
    assert trained(FAMILIES["deepseek"], messages) == [f"\n\n{word}<｜end▁of▁sentence｜>" for word in ("one", "two")]
    only = turns("a", "<think>\nhm\n</think>\n\n", "b", "two")
    assert trained(FAMILIES["qwen3"], only)[0] == "<|im_end|>"


def test_a_turn_that_ends_with_the_next_role_trains_its_token(trained):
    assert trained(GLM, turns("one", "yes", "two", "no")) == ["\nyes<|user|>", "\nno"]


def test_what_people_write_cannot_end_an_answer(trained):
    spelled = "a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    assert trained(FAMILIES["chatml"], turns(spelled, spelled, spelled, "ok")) == [
        f"{spelled}<|im_end|>",
        "ok<|im_end|>",
    ]


def test_a_template_without_an_end_token_says_that_no_end_is_learnt(trained, capsys, monkeypatch):
    monkeypatch.setattr("luban.core.log._warned", set())
    plain = Family(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        ("<s>", "</s>"),
    )
    assert trained(plain, turns("one", "yes", "two", "no")) == [" yes", " no"]
    assert "isn't taught where to end" in capsys.readouterr().err


BROKEN = {
    "leaves out its tool calls": (
        CHATML,
        [*turns("time?"), {**CALL, "content": ""}, RESULT, *turns("x", "noon")[1:]],
        2,
    ),
    "leaves out its words": (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content + '</s>' }}{% endif %}{% endfor %}",
        turns("a", "b", "c", "d"),
        2,
    ),
    "repeats its words": (
        "{% for m in messages %}{{ m.content + '|' + m.content + '</s>' }}{% endfor %}",
        turns("a", "b", "c", "d"),
        2,
    ),
    "before those of an earlier turn": (
        "{% for m in messages | reverse %}{{ m.content + '</s>' }}{% endfor %}",
        turns("a", "b", "c", "d"),
        4,
    ),
    "changes with what is in it": (
        "{{ messages | tojson | length }}{% for m in messages %}{{ m.content | length }}</s>{% endfor %}",
        turns("a", "b"),
        2,
    ),
    "ends its tool calls": (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function.name }})"
        "{% endfor %}{% endfor %}",
        [*turns("time?"), {**CALL, "content": ""}, RESULT],
        2,
    ),
}


@pytest.mark.parametrize("why", BROKEN)
def test_where_a_mask_would_be_a_guess_the_turn_is_named(trained, why):
    template, messages, turn = BROKEN[why]
    with pytest.raises(DataError, match=rf"turn {turn} of the conversation.*{why}") as refused:
        trained(Family(template, ("<s>", "</s>", "<|im_start|>", "<|im_end|>")), messages)
    assert "\n" not in str(refused.value)
    assert ("--chat-template FILE" if why == "leaves out its tool calls" else "{% generation %}") in str(refused.value)


def test_a_conversation_is_rendered_where_no_mask_can_be_found(tmp_path):
    """A served history needs no mask."""
    template = BROKEN["repeats its words"][0]
    tokenizer = load_tokenizer(Family(template, ("<s>", "</s>")).write(tmp_path / "t", template))
    assert render(turns("a", "b", "c"), tokenizer).token_ids


def test_the_date_is_the_same_in_every_filling(trained):
    template = CHATML.replace("{% for m", "{{ strftime_now('%f') }}{% for m", 1)
    family = Family(template, ("<|im_start|>", "<|im_end|>"))
    for _ in range(20):
        assert trained(family, turns("one", "yes")) == ["yes<|im_end|>"]


def test_roles_that_must_alternate_are_still_refused(trained):
    template = "{% for m in messages %}" + ALTERNATE + "{{ m.content }}</s>{% endfor %}"
    with pytest.raises(DataError, match="alternate"):
        trained(Family(template, ("<s>", "</s>")), turns("a", "b")[::-1])
