"""Answers: the prompt, citations that resolve to their source, and nothing where no passage supports an answer."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from indexes import index_of, squad_file

import luban
from luban.core.errors import DataError, UsageError
from luban.generate.structure import Structure
from luban.retrieval.answering import NOTHING, PassageRetriever, prompt, without_marks
from luban.retrieval.asking import Asker, evaluate_answers
from luban.retrieval.excerpts import excerpts
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


def test_excerpts_are_the_sentences_that_fit_best_in_their_order():
    texts = ["Alpha is red. Beta is blue. Gamma is a green fruit.", "Nothing here.", "Delta is a blue bird. Owls hoot."]
    assert excerpts("Which bird is blue?", texts, 1) == ["", "", "Delta is a blue bird."]
    assert excerpts("Which bird is blue?", texts, 2) == ["Beta is blue.", "", "Delta is a blue bird."]
    assert excerpts("Which bird is blue?", texts, 9) == texts
    assert excerpts("zzz", texts, 1) == ["Alpha is red.", "", ""]
    assert excerpts("蓝色的鸟？", ["红色的花。蓝色的鸟。"], 1) == ["蓝色的鸟。"]
    rng = random.Random()
    drawn = [
        " ".join(f"{' '.join(rng.choices('abcdefgh', k=rng.randrange(1, 6)))}." for _ in range(4)) for _ in range(3)
    ]
    every = [sentence for text in drawn for sentence in excerpts("x", [text], 9)[0].split(". ")]
    for count in (1, 3, 12):
        kept = [part for part in excerpts("a b c", drawn, count) if part]
        assert sum(part.count(".") for part in kept) == min(count, len(every))
        for part in kept:
            assert any(part.split(". ")[0].rstrip(".") in text for text in drawn)


def test_a_prompt_of_sentences_keeps_the_numbers_of_passages(index):
    retriever = PassageRetriever(index, sentences=1)
    grounding = retriever.ground(ask("the mint family, unlike the Eiffel Tower of Paris"), lambda messages: True)
    text = grounding.messages[-1]["content"]
    (number,) = (i for i, hit in enumerate(grounding.hits, 1) if f"[{i}] {hit.passage.title}\n" in text)
    written = text.split(f"[{number}] {grounding.hits[number - 1].passage.title}\n")[1].split("\n\nQuestion:")[0]
    assert written.strip() in grounding.hits[number - 1].passage.text and len(grounding.hits) > 1
    assert grounding.cited(f"so [{number}]")[0].hit == grounding.hits[number - 1]
    whole = PassageRetriever(index).ground(ask("the mint family"), lambda messages: True).messages[-1]["content"]
    assert all(
        hit.passage.text in whole for hit in PassageRetriever(index).ground(ask("the mint family"), lambda m: True).hits
    )
    with pytest.raises(UsageError, match="--sentences: at least 1"):
        PassageRetriever(index, sentences=0)


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


@pytest.mark.parametrize("sentences", [None, 1])
def test_a_quoting_model_answers_with_words_of_a_passage(index, tiny_checkpoint, sentences):
    """A random model's answers are words of one passage, whatever the question is, and cite it."""
    asker = Asker(index, luban.load_model(tiny_checkpoint), k=2, max_tokens=16, sentences=sentences, quote=True)
    for question in ("capital of France", "Which family is basil of?", "Eiffel Tower"):
        answer = asker.ask(question)
        held = [hit for hit in answer.read if f"{answer.written} " in f"{' '.join(hit.passage.text.split())} "]
        beginning = [hit for hit in answer.read if answer.written in " ".join(hit.passage.text.split())]
        assert beginning and (held or len(answer.written) > 10)  # 16 bytes may end inside of a word
        assert answer.text == NOTHING or answer.citations[0].hit in beginning


def test_a_quotation_cites_the_passage_that_it_stands_in(tmp_path):
    """Brackets of an encyclopedia are no marks, and the words of another passage in another order are no quotation."""
    texts = [
        "Allen lost his best year. A sack is a tackle, and career sacks are counted.",
        "Career sacks: Allen had\n136 [2]. His best year was 2011 [41].",
    ]
    rows = [{"id": str(n), "text": text} for n, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = Index(index_of(tmp_path / "texts.jsonl", tmp_path / "index"))
    grounding = PassageRetriever(index, quote=True).ground(ask("best year career sacks"), lambda messages: True)
    assert len(grounding.hits) == 2
    for hit in grounding.hits:
        words = hit.passage.text.split()
        for _ in range(20):
            start = random.randrange(len(words) - 3)
            quoted = " ".join(words[start : start + random.randint(3, len(words))])
            assert [citation.hit for citation in grounding.cited(quoted)] == [hit], quoted
    assert grounding.cited("sacks career") == grounding.cited(" ") == ()


def test_without_passages_a_quoting_model_says_that_there_is_nothing(index, tiny_checkpoint):
    """A random model has no other way, whether nothing was found or nothing fits its context."""
    retriever = PassageRetriever(index, quote=True)
    model = luban.load_model(tiny_checkpoint)
    sampling = luban.Sampling(max_tokens=64, min_tokens=1, temperature=1.0)
    for question, fits in (("zzz", lambda messages: True), ("basil", lambda messages: False)):
        grounding = retriever.ground(ask(question), fits)
        assert grounding.hits == () and grounding.grammar is not None
        structure = Structure.grammar(grounding.grammar)
        (result,) = Engine(model).generate(["x"], replace(sampling, structure=structure))
        assert result.choices[0].text == NOTHING and grounding.cited(NOTHING) == ()
    assert PassageRetriever(index).ground(ask("zzz"), lambda messages: True).grammar is None
