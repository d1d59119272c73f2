"""Answers: the prompt, citations that resolve to their source, and nothing where no passage supports an answer."""

from __future__ import annotations

import pytest
from indexes import index_of, squad_file

import luban
from luban.core.errors import DataError
from luban.retrieval.answering import NOTHING, PassageRetriever, prompt, without_marks
from luban.retrieval.asking import Asker, evaluate_answers
from luban.retrieval.index import Index
from luban.retrieval.questions import paragraphs, read_questions
from luban.serve.engine import Engine


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return squad_file(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def index(file):
    return Index(index_of(file, file.parent / "index"))


def ask(text):
    return [{"role": "user", "content": text}]


def test_the_prompt_numbers_its_passages_in_order(index):
    hits = index.search("the Eiffel Tower in Paris is no herb", 2)
    text = prompt("When?", hits)
    assert text.index("[1] Paris") < text.index("Eiffel") < text.index("[2] Basil") < text.index("Question: When?")
    assert NOTHING in text and text.endswith("Question: When?")


def test_marks_resolve_to_passage_and_offsets(index, file):
    texts = {document.id: document.text for document in paragraphs(file)}
    grounding = PassageRetriever(index).ground(ask("Eiffel Tower basil is"), lambda messages: True)
    rows = grounding.citations("Built in 1889 [1], see also [2][1] and [9].")
    assert [row["mark"] for row in rows] == [1, 2]
    for row in rows:
        assert texts[row["source"]][row["start"] : row["stop"]] == row["text"]


def test_an_answer_without_marks_cites_the_passage_that_holds_its_words(index):
    grounding = PassageRetriever(index).ground(ask("Eiffel Tower basil is"), lambda messages: True)
    assert [row["title"] for row in grounding.citations("It is one of many mint plants.")] == []  # 3 of its 7 words
    assert [row["title"] for row in grounding.citations("the mint family")] == ["Basil"]
    assert grounding.citations("Quantum chromodynamics") == grounding.citations(NOTHING) == []
    assert grounding.citations("1889 [7]") == []  # a mark that no passage has supports nothing


def test_passages_that_do_not_fit_are_left_out(index):
    retriever = PassageRetriever(index)
    whole = retriever.ground(ask("the Eiffel Tower basil is os"), lambda messages: True)
    longest = len(whole.messages[-1]["content"]) - 1
    fewer = retriever.ground(ask("the Eiffel Tower basil is os"), lambda m: len(m[-1]["content"]) <= longest)
    assert len(fewer.hits) == len(whole.hits) - 1 and fewer.hits == whole.hits[:-1]
    assert retriever.ground(ask("the"), lambda messages: False).hits == ()
    before = [{"role": "system", "content": "Be short."}]
    assert retriever.ground([*before, *ask("basil")], lambda messages: True).messages[0] == before[0]
    with pytest.raises(DataError, match="last message"):
        retriever.ground([{"role": "assistant", "content": "x"}], lambda messages: True)


def says(monkeypatch, text):
    """Let every model write this text."""

    class Choice:
        pass

    Choice.text = text
    result = type("Result", (), {"choices": [Choice]})
    monkeypatch.setattr(Engine, "generate", lambda self, prompts, sampling: [result])


def test_ask_gives_citations_or_says_that_nothing_supports_it(index, file, tiny_checkpoint, monkeypatch):
    model = luban.load_model(tiny_checkpoint)
    asker = Asker(index, model, k=1)
    says(monkeypatch, "1889 [1]")
    answer = asker.ask("When was the Eiffel Tower built?")
    assert answer.text == "1889 [1]" and answer.citations[0].hit.passage.title == "Paris"
    assert set(answer.row()) == {"answer", "citations"}
    figures = evaluate_answers(asker, read_questions(file))
    assert figures["exact_match"] == figures["f1"] == 0.5  # the second question is answered wrongly,
    assert (
        figures["attribution"] == 1 and figures["unsupported"] == 0
    )  # and cites a passage that holds the right answer
    says(monkeypatch, "Blue whales sing.")
    answer = asker.ask("When was the Eiffel Tower built?")
    assert (answer.text, answer.citations, answer.row()["written"]) == (NOTHING, (), "Blue whales sing.")
    assert asker.ask("zzz").text == NOTHING  # nothing found
    assert without_marks("a [1] b [12].") == "a b ."


def test_ask_runs_a_real_engine(index, tiny_checkpoint):
    answer = Asker(index, luban.load_model(tiny_checkpoint), k=1, max_tokens=4).ask("capital of France")
    assert isinstance(answer.written, str) and answer.text in (answer.written, NOTHING)
