"""The standard library as a corpus: what is held out is nowhere in what is trained on."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from luban.corpus.sources import find_sources, questions, stdlib
from luban.corpus.stdlib.library import Library, scan_library
from luban.corpus.stdlib.scan import parse_module, scan_sources
from luban.corpus.stdlib.summary import summary
from luban.corpus.tally import Tally

SEED, FRACTION = 5, 0.05


@pytest.fixture(scope="module")
def documents():
    found = defaultdict(list)
    for source in find_sources(["python:stdlib", "python:questions"]):
        for document in source.documents(Tally(), SEED, FRACTION):
            found[document.split].append(document)
    return found


def test_no_heldout_docstring_is_in_any_trained_text(documents):
    library = scan_library()
    held = library.heldout_units(FRACTION, SEED)
    everything = "\n\0\n".join(d.text for d in documents["train"])
    docs = {d.doc for m in library.modules for d in m.definitions if d.unit in held and len(d.doc) > 60}
    docs |= {d.doc for d in library.compiled if d.unit in held and len(d.doc) > 60}
    assert len(docs) > 100
    leaked = [doc for doc in docs if doc in everything]
    assert leaked == []


def test_no_heldout_definition_is_in_any_trained_source(documents):
    trained = "".join(d.text for d in documents["train"] if "/source/" in d.id)
    cut = [d for d in documents["heldout"] if "/source/" in d.id and ":" in d.id.split("/source/")[1]]
    assert len(cut) > 50
    bodies = {d.id: d.text.partition("\n")[2] for d in cut}
    assert [name for name, body in bodies.items() if len(body) > 500 and body in trained] == []


def test_every_source_names_its_module_first(documents):
    sources = [d for found in documents.values() for d in found if "/source/" in d.id]
    assert len(sources) > 500
    assert all(d.text.startswith(f"# module: {d.meta['module']}\n") for d in sources)
    assert {d.meta["module"] for d in sources} >= {"os.path", "json.decoder", "concurrent.futures"}


def test_enough_is_held_out_and_not_too_much(documents):
    held = sum(d.bytes for d in documents["heldout"] if d.messages is None)
    whole = held + sum(d.bytes for d in documents["train"] if d.messages is None)
    assert held >= 500_000
    assert held < 0.25 * whole
    assert whole > 8_000_000


def test_an_object_is_in_one_split_in_both_sources(documents):
    splits = defaultdict(set)
    for split, found in documents.items():
        for document in found:
            if "object" in (document.meta or {}):
                splits[document.meta["object"]].add(split)
    assert all(len(found) == 1 for found in splits.values())
    asked = {d.meta["object"] for d in documents["heldout"] if d.messages}
    assert 0.02 < len(asked) / len({d.meta["object"] for f in documents.values() for d in f if d.messages}) < 0.2


def test_ids_are_unique(documents):
    ids = [d.id for found in documents.values() for d in found]
    assert len(ids) == len(set(ids))


def test_questions_are_about_ten_thousand_and_say_what_is_right(documents):
    asked = [d for found in documents.values() for d in found if d.messages]
    assert 8_000 < len(asked) < 16_000
    for document in asked:
        question, answer = (m["content"] for m in document.messages)
        assert [m["role"] for m in document.messages] == ["user", "assistant"]
        assert document.meta["answer_key"] in answer
        assert document.meta["task"] in ("what", "signature", "summary", "which_module")
        assert question.strip() == question and answer.strip() == answer and "\n" not in question
    questions_asked = [(d.meta["task"], d.messages[0]["content"]) for d in asked]
    assert len(questions_asked) == len(set(questions_asked))
    modules = [d for d in asked if d.meta["task"] == "which_module"]
    assert len(modules) > 1500
    assert all(d.messages[1]["content"] == f"It is in the module {d.meta['module']}." for d in modules)


def test_every_held_out_which_module_question_can_be_answered_from_what_is_trained_on(documents):
    trained = {d.meta["module"] for d in documents["train"] if d.meta.get("module")}
    asked = [d for d in documents["heldout"] if d.messages and d.meta["task"] == "which_module"]
    assert len(asked) > 50 and {d.meta["module"] for d in asked} <= trained


def test_seed_0_holds_out_enough_which_module_questions_of_many_modules():
    library = scan_library()
    found = questions.documents(library, library.heldout_units(0.05, 0), "q")
    modules = Counter(d.meta["module"] for d in found if d.split == "heldout" and d.meta["task"] == "which_module")
    assert modules.total() >= 200
    assert max(modules.values()) <= 0.08 * modules.total()


def test_known_objects(documents):
    by_id = {d.id: d for found in documents.values() for d in found}
    join = by_id["python:stdlib/doc/os.path.join"]
    assert join.text.startswith("os.path.join(a, *p)\n\nJoin two or more pathname components")
    assert "Return the number of items in a container." in by_id["python:stdlib/doc/len"].text
    assert by_id["python:stdlib/doc/math.gcd"].meta["module"] == "math"
    assert by_id["python:questions/what/os.path.join"].messages[1]["content"].startswith("Join two or more pathname")


def test_modules_are_read_and_not_imported():
    code = "import sys; from luban.corpus.stdlib.library import scan_library; scan_library(); print('antigravity' in sys.modules, 'this' in sys.modules, 'turtle' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


SOURCE = '''"""The module."""
import os

@decorated
def first(a, b=1, *c):
    """First does one thing, and here is a long enough sentence about it."""
    return "first body"

if os.name == "nt":
    def second():
        return "nt"
else:
    def second():
        return "posix"

class Third:
    """Third is a class."""

    def __init__(self, x, y=2): ...

    def method(self, z):
        """Do a method's work."""

    @staticmethod
    def free(q):
        """Free of self."""
'''


def test_cutting_a_definition_out_leaves_the_rest():
    module = parse_module("m", SOURCE)
    rest = module.without({"m:first"})
    assert "first body" not in rest and "@decorated" not in rest
    assert "class Third" in rest and rest.startswith('"""The module."""')
    assert module.source_of("m:first").startswith("@decorated\ndef first")
    nested = module.without({"m:second"})
    ast.parse(nested)
    assert "return" not in nested.split("if os.name")[1].split("class Third")[0]
    assert module.without(set()) == SOURCE
    every = {s.unit for s in module.segments}
    assert "Third" not in module.without(every)


def test_definitions_have_names_kinds_and_signatures():
    found = {d.name: (d.kind, d.signature, d.unit) for d in parse_module("m", SOURCE).definitions}
    assert found == {
        "m": ("module", "", "module:m"),
        "m.first": ("function", "(a, b=1, *c)", "m:first"),
        "m.Third": ("class", "(x, y=2)", "m:Third"),
        "m.Third.method": ("method", "(z)", "m:Third"),
        "m.Third.free": ("method", "(q)", "m:Third"),
    }


def test_copies_of_a_docstring_are_held_out_together():
    doc = "Serialise the object to a stream, with every option that there is for it."
    one = parse_module("one", f'def dump(x):\n    """{doc}"""\n')
    two = parse_module("two", f'class Other:\n    def dump(self):\n        """{doc}\n\n        And more."""\n')
    short = "".join(f'def f{i}(x):\n    """Return a copy."""\n' for i in range(40))
    three = parse_module("three", short)
    library = Library(modules=(one, two, three), compiled=())
    assert library.repeats == {"one:dump": {"two:Other"}}
    for seed in range(40):
        held = library.heldout_units(0.3, seed)
        assert "one:dump" not in held or "two:Other" in held
        for unit, parts in library.units_of_module.items():
            assert unit not in held or parts <= held
    counts = [sum(f"three:f{i}" in library.heldout_units(0.3, seed) for i in range(40)) for seed in range(10)]
    assert any(0 < count < 40 for count in counts)  # short docstrings tie nothing together


def test_scanning_skips_tests_encodings_and_what_does_not_parse(tmp_path):
    for name in ("a.py", "test/b.py", "encodings/c.py", "pkg/__init__.py", "site-packages/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "old.py").write_text("print 'python 2'\n")
    assert [m.name for m in scan_sources(tmp_path)] == ["a", "pkg"]


@pytest.mark.parametrize(
    "doc, expected",
    [
        ("Return the answer to it. More follows.", "Return the answer to it."),
        ("join(a, b) -> str\n\nJoin all of the parts", "Join all of the parts."),
        ("Use it, e.g. Like this, for the best.\n\nMore", "Use it, e.g. Like this, for the best."),
        ("A line\n  that goes on\n\nmore", "A line that goes on."),
        ("short", None),
        ("", None),
        (">>> example of the code", None),
    ],
)
def test_summaries(doc, expected):
    assert summary(doc) == expected


def test_ambiguous_names_are_hinted_or_left_out():
    dump = 'def dump(obj):\n    """{}"""\ndef only_{}(x):\n    """{}"""\n'
    modules = tuple(
        parse_module(name, dump.format(text, name, f"An unusual thing that {name} does."))
        for name, text in [("json", "Write the object as JSON text."), ("pickle", "Write the object as a pickle.")]
    )
    found = list(questions.documents(Library(modules=modules, compiled=()), frozenset(), "q"))
    for document in found:
        if document.meta["task"] == "which_module" and "dump" in document.meta["object"]:
            assert "Write the object" in document.messages[0]["content"]
    same = tuple(parse_module(n, 'def dump(obj):\n    """Write the object as text."""\n') for n in ("json", "pickle"))
    found = list(questions.documents(Library(modules=same, compiled=()), frozenset(), "q"))
    assert not [d for d in found if d.meta["task"] == "which_module"]


def test_a_held_out_module_gives_no_training_document():
    module = parse_module("m", SOURCE)
    library = Library(modules=(module,), compiled=())
    found = list(stdlib.documents(library, frozenset({"module:m", "m:first", "m:second", "m:Third"}), "s"))
    assert {d.split for d in found} == {"heldout"}
