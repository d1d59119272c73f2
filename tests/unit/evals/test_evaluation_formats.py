"""Public formats, generated items, filters and scorers: each on a small file or value of its own."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace

import pytest
from evals_shared import write_task

from luban.core.errors import ConfigError, DataError
from luban.evals import filters, scorers
from luban.evals.data import read_task
from luban.evals.formats import FORMATS
from luban.evals.generated import GENERATORS
from luban.evals.kinds.base import Example
from luban.evals.names import shipped_tasks
from luban.evals.spec import Generated, load_tasks

SQUAD = {
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Rhine flows through Basel.",
                    "qas": [
                        {
                            "id": "a1",
                            "question": "Which river?",
                            "answers": [{"text": "The Rhine", "answer_start": 0}] * 2,
                        },
                        {"id": "a2", "question": "Which sea?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ]
}
COQA = {
    "data": [
        {
            "id": "s1",
            "story": "Ann has a cat. It is grey.",
            "questions": [{"input_text": "Who has a cat?"}, {"input_text": "Its colour?"}],
            "answers": [{"input_text": "Ann"}, {"input_text": "grey"}],
            "additional_answers": {"0": [{"input_text": "Ann"}, {"input_text": "Grey."}]},
        }
    ]
}
TRIVIA = {
    "Data": [
        {
            "QuestionId": "q1",
            "Question": "Capital of France?",
            "Answer": {"Value": "Paris", "Aliases": ["Paris", "City of Light"]},
        }
    ]
}
HUMAN = {
    "task_id": "HumanEval/0",
    "prompt": "def add(a, b):\n",
    "canonical_solution": "    return a + b\n",
    "test": "def check(f):\n    assert f(1, 2) == 3\n",
    "entry_point": "add",
}
FILES = {  # format → (name of the file, its content, one row of what is read)
    "lambada": (
        "l.jsonl",
        json.dumps({"text": "He opened the old door"}),
        {"context": "He opened the old", "word": "door"},
    ),
    "triviaqa": (
        "t.json",
        json.dumps(TRIVIA),
        {"question": "Capital of France?", "answers": ["Paris", "City of Light"]},
    ),
    "squad": (
        "s.json",
        json.dumps(SQUAD),
        {"id": "a1", "answers": ["The Rhine"], "answerable": True, "title": "Rivers"},
    ),
    "coqa": ("c.json", json.dumps(COQA), {"id": "s1:1", "history": [], "answers": ["Ann"]}),
    "wmt": ("p.tsv", "Guten Tag\tGood day\nJa\tYes\n", {"source": "Guten Tag", "reference": "Good day"}),
    "e2e": (
        "e.txt",
        "name[X]||X is good.\nname[X]||Try X.\n",
        {"meaning": "name[X]", "wordings": ["X is good.", "Try X."]},
    ),
    "mmlu": (
        "us_history_test.csv",
        '"Who, then?",A1,B1,C1,D1,C\n',
        {"subject": "us history", "question": "Who, then?", "answer": "C"},
    ),
    "gsm8k": ("g.jsonl", json.dumps({"question": "2+2?", "answer": "It is 4.\n#### 4"}), {"number": "4"}),
    "humaneval": ("h.jsonl.gz", gzip.compress(json.dumps(HUMAN).encode()), {"id": "HumanEval/0", "entry_point": "add"}),
}


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("form", FILES)
def test_a_file_of_each_format_is_read_and_its_task_asks_it(form, tmp_path):
    name, content, expected = FILES[form]
    path = write(tmp_path, name, content)
    rows = list(FORMATS[form](path))
    assert expected.items() <= rows[0].items()
    (task,) = load_tasks(form, str(path))
    items, _, _ = read_task(task)
    assert items and all(item.question for item in items)
    if form != "humaneval":
        assert items[0].answer in str(rows[0]) or items[0].answer in rows[0].values()


def test_later_turns_and_unanswerable_questions(tmp_path):
    turns = list(FORMATS["coqa"](write(tmp_path, "c.json", FILES["coqa"][1])))
    assert turns[1]["history"] == [{"question": "Who has a cat?", "answer": "Ann"}] and turns[1]["answers"] == [
        "grey",
        "Grey.",
    ]
    (task,) = load_tasks("coqa", str(tmp_path / "c.json"))
    assert (
        read_task(task)[0][1].question
        == "Ann has a cat. It is grey.\n\nQ: Who has a cat?\nA: Ann\n\nQ: Its colour?\nA:"
    )
    none = list(FORMATS["squad"](write(tmp_path, "s.json", FILES["squad"][1])))[1]
    assert none["answers"] == ["unanswerable"] and not none["answerable"]


def test_translations_in_two_files_and_subjects_in_a_folder(tmp_path):
    write(tmp_path, "n.de", "Ja\nNein\n"), write(tmp_path, "n.en", "Yes\nNo\n")
    assert [r["reference"] for r in FORMATS["wmt"](tmp_path / "n.de+n.en")] == ["Yes", "No"]
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", "n.en", "Yes\nNo\n")
    (task,) = load_tasks("wmt", f"{tmp_path / 'n.de'}+{other}")
    assert [item.answer for item in read_task(task)[0]] == ["Yes", "No"]
    write(tmp_path, "n.fr", "Oui\n")
    with pytest.raises(DataError, match=r"2 lines and n\.fr 1"):
        list(FORMATS["wmt"](tmp_path / "n.de+n.fr"))
    (tmp_path / "m").mkdir()
    for subject in ("law", "art"):
        write(tmp_path / "m", f"{subject}_test.csv", "Q,1,2,3,4,A\n")
    assert [r["subject"] for r in FORMATS["mmlu"](tmp_path / "m")] == ["art", "law"]


@pytest.mark.parametrize(
    ("form", "content", "said"),
    [
        ("lambada", '{"text": "one"}', "x:1 is a single word"),
        ("lambada", '{"txt": "one"}', "x:1 has no text"),
        ("lambada", "{", "x:1 is not JSON"),
        ("triviaqa", "[]", "has no list 'Data'"),
        ("squad", '{"data": [{"paragraphs": [{"context": "c"}]}]}', "has no qas"),
        (
            "coqa",
            '{"data": [{"id": "1", "story": "s", "questions": [{}], "answers": []}]}',
            "1 questions and 0 answers",
        ),
        ("wmt", "no tab", "x:1 has no tab"),
        ("mmlu", "q,a,b,c,d,E", "row 1: question, four choices"),
        ("gsm8k", '{"question": "q", "answer": "4"}', "no number behind ####"),
        ("humaneval", '{"task_id": "1", "prompt": "p"}', "has no test, entry_point"),
        ("e2e", "no bars", "no || between"),
        ("lambada", b"\xff\xfe", "no UTF-8"),
    ],
)
def test_a_file_that_is_not_right_is_refused_with_its_place(tmp_path, form, content, said):
    with pytest.raises(DataError) as refused:
        list(FORMATS[form](write(tmp_path, "x", content)))
    assert said in str(refused.value)


def test_every_shipped_task_is_sound_and_generated_ones_have_items():
    for name in shipped_tasks():
        for task in load_tasks(name):
            assert task.spec.about and (task.spec.generated or task.spec.items or task.spec.source)
            if task.spec.items:
                assert len(read_task(task)[0]) == len(task.spec.items)
            if task.spec.generated:
                few = replace(task, spec=replace(task.spec, generated=replace(task.spec.generated, items=20)))
                items, _, identity = read_task(few)
                assert len(items) == 20 and read_task(few)[2] == identity


def test_arithmetic_is_right_and_of_the_digits_that_it_says():
    for name in ("add_2", "subtract_3", "multiply_2", "one_digit_composite", "add_5"):
        rows = GENERATORS[name](Generated(name=name, items=300))
        for row in rows:
            said = row["question"].removeprefix("What is ").removesuffix("?")
            for word, sign in (("plus", "+"), ("minus", "-"), ("times", "*")):
                said = said.replace(word, sign)
            assert row["answer"] == str(eval(said))
        if name.startswith("add"):
            largest = max(int(word) for row in rows for word in row["question"].rstrip("?").split() if word.isdecimal())
            assert 10 ** (int(name[-1]) - 1) <= largest < 10 ** int(name[-1])
    assert GENERATORS["add_2"](Generated(name="add_2", seed=1)) != GENERATORS["add_2"](Generated(name="add_2"))


def test_scrambled_words_hold_the_letters_that_they_must(tmp_path):
    (tmp_path / "w.txt").write_text("inevitably opponent corruption succession banana")
    made = {
        name: GENERATORS[name](Generated(name=name, words=str(tmp_path / "w.txt"), seed=random.randrange(99)))
        for name in ("cycle_letters", "anagrams_1", "anagrams_2", "random_insertion", "reversed_words")
    }
    for name, rows in made.items():
        assert len(rows) == 5
        for row in rows:
            mixed, word = row["scrambled"], row["word"]
            if name == "cycle_letters":
                assert mixed in word + word and len(mixed) == len(word) and mixed != word
            elif name.startswith("anagrams"):
                kept = int(name[-1])
                assert sorted(mixed) == sorted(word) and mixed != word
                assert mixed[:kept] == word[:kept] and mixed[-kept:] == word[-kept:]
            elif name == "random_insertion":
                assert mixed[::2] == word and not any(c.isalpha() for c in mixed[1::2])
            else:
                assert mixed[::-1] == word
    with pytest.raises(ConfigError, match="no word of 5 letters"):
        (tmp_path / "w.txt").write_text("a bb ccc")
        GENERATORS["cycle_letters"](Generated(name="x", words=str(tmp_path / "w.txt")))


def test_new_words_are_used_by_their_own_sentence():
    rows = GENERATORS["new_words"](Generated(name="new_words", items=100))
    assert len({row["word"] for row in rows}) == 100
    assert all(row["word"] in row["sentence"] for row in rows)


def test_what_was_told_is_asked_for_after_as_many_turns_as_it_says():
    for row in GENERATORS["forgetting"](Generated(name="forgetting", items=40)):
        told, asked = row["prompt"].split("\n")[0], row["prompt"].split("\n")[-2]
        assert row["must"][0] in told and (row["must"][0] in told.split(",")[0]) == ("name" in asked)
        assert row["prompt"].count("User:") == int(row["about"].split()[0]) + 2


def test_filters():
    regex = filters.Regex(pattern=r"(?:is (\d+)|(\d+) it is)", which="last")
    assert regex.apply("3 it is, or it is 4") == "4" and regex.apply("none") == "[invalid]"
    assert filters.FirstLine().apply("\n a \nb") == "a" and filters.Until(stop=("\n", "B")).apply("aBc\n") == "a"
    assert filters.RemovePunctuation().apply("a.b, c!") == "ab c" and filters.Strip().apply(" a ") == "a"
    assert filters.LastNumber().apply("so 1,200.50") == "1200.5" and filters.LastNumber().apply("x") == "[invalid]"
    assert (
        filters.Remove(pattern=r"\d").apply("a1b2") == "ab"
        and filters.Code().apply("x\n```python\nf()\n```") == "f()\n"
    )


def test_scorers():
    example = Example(id="1", row={"w": "zorp", "t": "assert f() == 1"}, question="q", references=("The Rhine", "7"))
    assert scorers.Equal().one(" The Rhine\n", example) == 1 and scorers.Equal().one("the rhine", example) == 0
    assert scorers.Equal(filters=(filters.Lower(),)).one("the rhine", example) == 1
    assert (
        scorers.ExactMatch().one("rhine!", example) == 1
        and scorers.Contains().one("it is the Rhine, yes", example) == 1
    )
    assert scorers.Number().one("so #### 7", example) == 1 and scorers.Number().one("seven", example) == 0
    assert (
        scorers.Uses(word="w").one("We saw a zorp.", example) == 1 and scorers.Uses(word="w").one("zorp", example) == 0
    )
    assert scorers.Rouge().score(["the rhine", "x"], example) == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}
    repeated = scorers.Repetition(n=2)
    assert repeated.one("a b", example) == 0 and repeated.one("go on go on go on", example) == pytest.approx(3 / 5)
    tests = scorers.Tests(tests="t", before="def f():\n", k=(1, 2))
    found = tests.score(["    return 1", "    return 2", "    while True: pass"][:2], example)
    assert found == {"pass@1": 0.5, "pass@2": 1.0}


def test_code_is_run_against_its_tests(tmp_path):
    (task,) = load_tasks("humaneval", str(write(tmp_path, "h.jsonl", json.dumps(HUMAN))))
    (item,), _, _ = read_task(task)
    (metric,) = task.spec.kind.metrics
    assert metric.score(["    return a + b\n"], item) == {"pass@1": 1.0}
    assert metric.score(["    return a - b\n"], item) == {"pass@1": 0.0}
    spec = {"prompt": "p", "kind": {"type": "generate", "metrics": [{"type": "tests", "tests": "t", "k": [3]}]}}
    with pytest.raises(ConfigError, match="pass@3 needs as many repeats"):
        load_tasks(write_task(tmp_path, "t", spec, [{}]))
