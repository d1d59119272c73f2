"""Instruction data from a scripted model: what is read, filtered, counted, resumed."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
from evals_shared import Scripted, read_json, read_lines

from luban.align.instruct import prompts
from luban.align.instruct.filters import InstructionFilter
from luban.align.instruct.run import InstructConfig, generate_instructions
from luban.align.instruct.seeds import Instruction, read_seeds
from luban.cli.main import main
from luban.core.errors import DataError, UnfinishedError
from luban.core.metrics.rouge import rouge_l
from luban.evals.requests import Failed, Written

SEEDS = [
    {
        "instruction": f"Explain {topic} to a child",
        "instances": [{"input": "", "output": f"{topic} is nice."}],
        "is_classification": False,
    }
    for topic in ("gravity", "money", "the sea", "winter", "a clock")
] + [
    {
        "instruction": f"Is the {thing} good or bad?",
        "instances": [{"input": "I liked it", "output": "good"}],
        "is_classification": True,
    }
    for thing in ("film", "book", "meal")
]
WORDS = [
    "river",
    "castle",
    "garden",
    "bread",
    "stone",
    "letter",
    "window",
    "dream",
    "forest",
    "engine",
    "planet",
    "tailor",
    "harbour",
    "lantern",
    "violin",
    "meadow",
    "spider",
    "ticket",
    "mirror",
    "bridge",
    "candle",
    "dragon",
    "falcon",
]


@pytest.fixture
def seeds(tmp_path):
    file = tmp_path / "seeds.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in SEEDS))
    return file


def invent(rng):
    return " ".join(rng.sample(WORDS, 6))


def list_of_tasks(request):
    rng = random.Random(str(request))
    made = [f" {invent(rng).capitalize()}\n{i}. Input: <noinput>\n{i}. Output: {invent(rng)}\n" for i in range(4, 8)]
    made += [" Draw the castle in the garden now\n8. Input: x\n8. Output: y\n", " No output here at all\n9. Input: x\n"]
    return Written(text="###\n9. Instruction:".join(made), finish_reason="stop", tokens=50, prompt_tokens=100)


def test_whole_tasks_are_read_and_one_that_was_cut_off_is_not():
    demos = [Instruction(instruction="Add", input="1 2", output="3")]
    prompt = prompts.alpaca_prompt(demos, 20)
    assert prompt.endswith("1. Instruction: Add\n1. Input: 1 2\n1. Output: 3\n###\n2. Instruction:")
    text = " Name a colour\n2. Input: <noinput>\n2. Output: Red\n###\n3. Instruction: Double it\n3. Input: 4\n3. Output: 8\nand no more\n###\n4. Instruction: Say"
    found, dropped = prompts.read_alpaca(text, whole=False)
    assert (
        found
        == [
            Instruction(instruction="Name a colour", output="Red"),
            Instruction(instruction="Double it", input="4", output="8\nand no more"),
        ]
        and dropped == 1
    )
    assert prompts.read_alpaca(text, whole=True)[1] == 1  # the last has no output


def test_instructions_and_instances_are_read():
    assert prompts.read_instructions(" Sing\nTask 10: Dance\nTask 11: Ju", 9, 8, whole=False) == ["Sing", "Dance"]
    assert prompts.read_instance(" 2 3\nOutput: 5\nTask: x", "Add", classification=False) == Instruction(
        instruction="Add", input="2 3", output="5"
    )
    label = prompts.read_instance(" bad\nInput: I hated it", "Rate", classification=True)
    assert label == Instruction(instruction="Rate", input="I hated it", output="bad", classification=True)
    assert prompts.read_instance(" only an input", "Add", classification=False) is None


def test_no_kept_pair_is_similar_and_every_reason_is_counted():
    rng = random.Random()
    keeper = InstructionFilter([Instruction(instruction="Name three rivers of Europe", output="x")])
    kept = [
        text
        for text in (" ".join(rng.choices("abcdefgh", k=rng.randint(4, 9))) for _ in range(150))
        if keeper.admit(text) is not None
    ]
    for one, other in itertools.combinations(kept, 2):
        assert rouge_l(one, other) < 0.7
    assert len(kept) + keeper.dropped["similar"] == 150
    for text, reason in (
        ("Too short", "length"),
        ("Draw a map of the town", "not text"),
        ("Write a program that sorts numbers", "program"),
        ("、first sign of it all", "beginning"),
        ("Name three rivers of Europe", "similar"),
    ):
        before = keeper.dropped[reason]
        assert keeper.admit(text) is None and keeper.dropped[reason] == before + 1


def test_tasks_are_generated_until_there_are_enough(seeds, tmp_path):
    backend = Scripted(list_of_tasks)
    config = InstructConfig(count=20, parallel=2, price_in=1.0, price_out=2.0)
    found = generate_instructions(backend, seeds, tmp_path / "out", config)
    rows = read_lines(tmp_path / "out" / "instructions.jsonl")
    assert len(rows) == 20 == found["kept"] and found["highest_similarity"] < 0.7
    assert rows[0]["messages"][0]["content"] == rows[0]["instruction"]
    calls = len(backend.asked)
    assert found["dropped"]["unreadable"] == calls and found["dropped"]["not text"] == calls
    assert found["tokens_read"] == 100 * calls and found["cost"] == pytest.approx((100 + 2 * 50) * calls / 1e6)
    assert read_json(tmp_path / "out" / "manifest.json")["kind"] == "instructions"
    shown = backend.asked[0].prompt[0]["content"]
    assert sum(seed["instruction"] in shown for seed in SEEDS) == 3


def test_an_interrupted_run_goes_on_without_asking_again(seeds, tmp_path):
    config = InstructConfig(count=30, parallel=2)
    asked = []

    def stop_at_third(request):
        asked.append(request)
        return Failed(error="down") if len(asked) in (5, 6) else list_of_tasks(request)

    with pytest.raises(UnfinishedError, match="2 requests have no answer"):
        generate_instructions(Scripted(stop_at_third), seeds, tmp_path / "out", config)
    second = Scripted(list_of_tasks)
    generate_instructions(second, seeds, tmp_path / "out", config)
    whole = Scripted(list_of_tasks)
    generate_instructions(whole, seeds, tmp_path / "whole", config)
    assert read_lines(tmp_path / "out" / "instructions.jsonl") == read_lines(tmp_path / "whole" / "instructions.jsonl")
    assert len(second.asked) == len(whole.asked) - 4


def test_self_instruct_asks_for_instruction_kind_and_instance(seeds, tmp_path):
    rng = random.Random(1)

    def say(request):
        text = request.prompt
        if text.startswith("Come up"):
            first = int(re.findall(r"Task (\d+):$", text)[0])
            return f" {invent(rng)}" + "".join(f"\nTask {first + i}: {invent(rng)}" for i in range(1, 8))
        if text.endswith("Classification:"):
            return " Yes" if "river" in text.rsplit("Task:", 1)[1] else " No"
        return " good\nInput: a river" if text.endswith("Label:") else f" <noinput>\nOutput: {invent(rng)}"

    backend = Scripted(say)
    config = InstructConfig(method="self_instruct", count=12, parallel=1, chat=False)
    found = generate_instructions(backend, seeds, tmp_path / "out", config)
    rows = read_lines(tmp_path / "out" / "instructions.jsonl")
    assert found["kept"] == len(rows) == 12
    for row in rows:
        assert (row["output"] == "good") == ("river" in row["instruction"])
    later = [r.prompt for r in backend.asked if r.prompt.startswith("Come up")][-1]
    assert sum(row["instruction"] in later for row in rows) == 2  # of its own making


def test_what_is_not_right_is_refused(seeds, tmp_path, capsys):
    with pytest.raises(DataError, match="no task of scripted could be used"):
        generate_instructions(Scripted(lambda r: "I can't."), seeds, tmp_path / "o", InstructConfig(calls=2))
    (tmp_path / "few.jsonl").write_text(json.dumps(SEEDS[0]) + "\n")
    with pytest.raises(DataError, match="1 seed tasks: at least 3"):
        read_seeds(tmp_path / "few.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x"}\n')
    assert main(["data", "instruct", str(tmp_path / "bad.jsonl"), "--model", "rule", "--out", str(tmp_path / "o")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
