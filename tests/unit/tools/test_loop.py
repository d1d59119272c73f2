"""Answers with tools: the loop's order and limits, tools that fail, hang or give too much, arguments held to schemas."""

from __future__ import annotations

import json
import threading

import chat_families
import pytest

pytest.importorskip("llguidance")

from scripted import ScriptedEngine

import luban
from luban.core.errors import ConfigError, DataError, UsageError
from luban.generate.sampling import Sampling
from luban.tokenizer.tokenizer import load_tokenizer
from luban.tools.calculator import calculator
from luban.tools.loop import ToolLimits, run_tools
from luban.tools.open import open_tools
from luban.tools.search import search_tool
from luban.tools.tool import call_tool, shorten, tool_of

USER = [{"role": "user", "content": "go"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    made = chat_families.Family(chat_families.QWEN3, ("<|im_start|>", "<|im_end|>"), calls=True)
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + made.plain
    return load_tokenizer(made.write(tmp_path_factory.mktemp("qwen") / "tokenizer", template))


def call(name, **arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'


def test_results_reach_the_model_and_its_answer_the_user(tokenizer):
    script = [
        "Let me see. " + call("calculator", expression="6 * 7"),
        lambda prompt: "It is " + prompt[-60:].split()[1],
    ]
    engine, heard = ScriptedEngine(tokenizer, script), []
    run = run_tools(engine, USER, [calculator()], on_text=heard.append)
    assert "<tool_response>\n42\n</tool_response>" in engine.prompts[1] and '"calculator"' in engine.prompts[0]
    assert run.ended == "answer" and [m["role"] for m in run.messages] == ["assistant", "tool", "assistant"]
    assert "".join(heard) == run.text and run.text.startswith("Let me see. It is") and not engine.refused
    (made,) = run.calls
    assert (
        made.outcome.text == "42" and not made.outcome.failed and json.loads(made.arguments) == {"expression": "6 * 7"}
    )
    assert run.messages[0]["tool_calls"][0]["id"] == run.messages[1]["tool_call_id"]


def test_names_and_arguments_are_held_to_the_tools(tokenizer):
    def pick(city: str, days: int) -> str:
        """Pick."""
        return f"{city} {days}"

    for wrong in (call("other", city="a", days=1), call("pick", city="a", days="x"), call("pick", days=1, town="a")):
        engine = ScriptedEngine(tokenizer, [wrong])
        assert not run_tools(engine, USER, [tool_of(pick)]).calls and engine.refused
    engine = ScriptedEngine(
        tokenizer, [call("pick", city="Rome", days=2) + "\n" + call("pick", city="é", days=-1), "ok"]
    )
    assert [made.outcome.text for made in run_tools(engine, USER, [tool_of(pick)]).calls] == ["Rome 2", "é -1"]


def test_the_loop_ends_after_the_calls_that_it_may_make(tokenizer):
    again = call("calculator", expression="1 + 1")
    engine = ScriptedEngine(tokenizer, [again, again + "\n" + again + "\n" + again, again])
    run = run_tools(engine, USER, [calculator()], limits=ToolLimits(calls=2))
    assert [made.outcome.failed for made in run.calls] == [False, False, True, True]
    assert "limit of 2 calls" in run.calls[2].outcome.text and run.ended == "calls"
    assert engine.refused == ["<tool_call"] and not engine.script  # the last answer could not be a call


def test_tools_that_raise_or_leave_are_named(tokenizer):
    def broken() -> str:
        raise ValueError("no such city")

    def leaving() -> str:
        raise SystemExit(3)

    script = [call("broken") + "\n" + call("leaving"), "sorry"]
    run = run_tools(ScriptedEngine(tokenizer, script), USER, [tool_of(broken), tool_of(leaving)])
    assert [made.outcome.text for made in run.calls] == [
        "error: broken failed: ValueError: no such city",
        "error: leaving failed: SystemExit: 3",
    ]
    assert all(made.outcome.failed for made in run.calls) and run.text == "sorry"


def test_a_tool_that_hangs_is_left_behind_and_not_called_again(tokenizer):
    release, count = threading.Event(), []

    def slow() -> str:
        count.append(1)
        release.wait(60)
        return "late"

    script = [call("slow"), call("slow"), "enough"]
    run = run_tools(ScriptedEngine(tokenizer, script), USER, [tool_of(slow)], limits=ToolLimits(call_seconds=0.05))
    release.set()
    assert run.calls[0].outcome.hung and "no result within 0.05 seconds" in run.calls[0].outcome.text
    assert "still running" in run.calls[1].outcome.text and count == [1] and run.text == "enough"


def test_megabytes_are_cut(tokenizer):
    def large() -> str:
        return "é" * 3_000_000

    def table() -> list[int]:
        return list(range(100_000))

    script = [call("large") + "\n" + call("table"), "ok"]
    engine = ScriptedEngine(tokenizer, script)
    run = run_tools(engine, USER, [tool_of(large), tool_of(table)], limits=ToolLimits(result_bytes=101))
    first, second = (made.outcome for made in run.calls)
    assert first.cut and first.text == "é" * 50 + " [cut: 3000000 characters, 50 shown]"
    assert second.cut and second.text.startswith("[0, 1, 2") and len(engine.prompts[1]) < 3000


def test_results_are_shortened_to_the_context(tokenizer):
    def large() -> str:
        return "word " * 1000

    engine = ScriptedEngine(tokenizer, [call("large"), "ok"], context=1200)
    assert run_tools(engine, USER, [tool_of(large)]).text == "ok"
    assert "[cut:" in engine.prompts[1]


def test_time_ends_an_answer(tokenizer):
    run = run_tools(ScriptedEngine(tokenizer, ["a" * 500]), USER, [calculator()], limits=ToolLimits(seconds=1e-9))
    assert run.ended == "seconds" and len(run.text) < 500


def test_whatever_a_random_model_writes_is_text_or_calls_by_the_schema(tiny_checkpoint):
    template = (
        "{{ tools | tojson }} <tool_call>{% for m in messages %}{{ '<|user|>' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + c.function.arguments | tojson }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><tool_call>{% endif %}"
    )
    model = luban.load_model(tiny_checkpoint)
    model.tokenizer.chat_template = template
    engine = luban.Engine(model)

    def f(x: bool) -> bool:
        return not x

    for seed in range(3):
        run = run_tools(engine, USER, [tool_of(f)], Sampling(max_tokens=40, seed=seed), limits=ToolLimits(calls=2))
        assert run.ended in ("answer", "length", "calls")
        assert all(json.loads(made.arguments).keys() == {"x"} for made in run.calls)


def test_schemas_are_read_from_signatures():
    def f(a: str, b: list[int], c: float | None = None, *, d: bool = True) -> None:
        """Does it.

        Not this."""

    tool = tool_of(f)
    assert tool.description == "Does it." and tool.parameters["required"] == ["a", "b"]
    assert tool.parameters["properties"]["b"] == {"type": "array", "items": {"type": "integer"}}
    assert tool.parameters["properties"]["c"] == {"anyOf": [{"type": "number"}, {"type": "null"}]}
    for wrong in (lambda x: x, lambda *x: x):
        with pytest.raises(ConfigError):
            tool_of(wrong)


def test_search_asks_a_retriever(tokenizer):
    class Fixed:
        def search(self, query, k):
            return [{"text": f"about {query}", "title": "T", "score": 1.0}] * k

    script = [call("search", query="owls"), "done"]
    engine = ScriptedEngine(tokenizer, script)
    run_tools(engine, USER, [search_tool(Fixed(), k=2)])
    assert engine.prompts[1].count('{"title": "T", "text": "about owls"}') == 2


def test_an_index_is_searched_by_name(tmp_path):
    pytest.importorskip("pyarrow")
    from luban.cli.chat import _index
    from luban.cli.main import main

    (tmp_path / "owls.md").write_text("# Owls\n\nOwls hunt at night and see well in the dark.\n")
    assert main(["rag", "index", str(tmp_path / "owls.md"), "--out", str(tmp_path / "index"), "--encoder", "bm25"]) == 0
    (tool,) = open_tools([f"search:{tmp_path / 'index'}"], _index)
    outcome = call_tool(tool, '{"query": "when do owls hunt"}', seconds=60, limit=4000)
    assert not outcome.failed and "Owls hunt at night" in json.loads(outcome.text)[0]["text"]


def test_tools_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def twice(x: int) -> int:\n    return 2 * x\n")
    first, second = open_tools([f"calculator,{file}:twice"])
    assert (first.name, second.name) == ("calculator", "twice")
    assert call_tool(second, '{"x": 4}', seconds=5, limit=100).text == "8"
    assert call_tool(second, '{"y": 4}', seconds=5, limit=100).failed
    assert call_tool(second, "[1]", seconds=5, limit=100).failed
    for wrong, error in (("nothing", UsageError), (f"{file}:none", ConfigError), ("calculator,calculator", UsageError)):
        with pytest.raises(error):
            open_tools([wrong])


def test_shortening_keeps_whole_characters():
    assert shorten("aé", 3) == "aé" and shorten("aéé", 4).startswith("aé [cut")


def test_a_template_without_calls_is_refused(tiny_checkpoint):
    with pytest.raises(DataError, match="chat template"):
        run_tools(luban.Engine(luban.load_model(tiny_checkpoint)), USER, [calculator()])
