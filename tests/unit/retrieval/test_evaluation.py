"""Questions in both formats, and the measures of retrieval."""

from __future__ import annotations

import json

import pytest
from indexes import PARAGRAPHS, index_of, squad_file

from luban.core.errors import DataError
from luban.retrieval.evaluation import evaluate_retrieval
from luban.retrieval.index import Index
from luban.retrieval.questions import is_question_file, read_questions


def dpr_file(folder, lines=False):
    rows = [
        {
            "question": "joins path components",
            "answers": ["separator"],
            "positive_ctxs": [{"title": "Join", "text": PARAGRAPHS["Join"]}],
            "hard_negative_ctxs": [{"title": "Paris", "text": PARAGRAPHS["Paris"]}],
        },
        {"question": "herb", "answers": ["1889"]},
    ]
    file = folder / ("dpr.jsonl" if lines else "dpr.json")
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return file


def test_squad_is_measured_by_the_place_of_the_answer(tmp_path):
    file = squad_file(tmp_path)
    assert is_question_file(file)
    index = Index(index_of(file, tmp_path / "index"))
    questions = read_questions(file)
    assert [question.source for question in questions] == ["squad.json/Paris#0", "squad.json/Basil#0"]
    (row,) = evaluate_retrieval(index, questions, (1, 3))
    assert row["top_1"] == row["top_3"] == row["mrr"] == 1 and row["questions"] == 2
    assert row["top_1_interval"] == (1, 1)


@pytest.mark.parametrize("lines", [False, True])
def test_dpr_is_measured_by_the_words_of_the_answer(tmp_path, lines):
    index = Index(index_of(squad_file(tmp_path), tmp_path / "index"))
    questions = read_questions(dpr_file(tmp_path, lines))
    assert questions[0].negatives == (("Paris", PARAGRAPHS["Paris"]),)
    (row,) = evaluate_retrieval(index, questions, (1, 2))
    assert row["top_1"] == 0.5 and row["mrr"] == 0.5  # "herb" finds basil alone


def test_the_reciprocal_rank_counts_places(tmp_path):
    index = Index(index_of(squad_file(tmp_path), tmp_path / "index"))
    file = tmp_path / "q.json"
    file.write_text(json.dumps([{"question": "the Eiffel Tower is a herb", "answers": ["mint"]}]))
    (row,) = evaluate_retrieval(index, read_questions(file), (1, 2))
    assert (row["top_1"], row["top_2"], row["mrr"]) == (0, 1, 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ('{"data": [{}]}', "format"), ("[]", "no questions"), ('[{"question": "a"}]', "format")],
)
def test_damaged_question_files_are_refused(tmp_path, text, words):
    file = tmp_path / "q.json"
    file.write_text(text)
    with pytest.raises(DataError, match=words):
        read_questions(file)
    with pytest.raises(DataError, match="not a file"):
        read_questions(tmp_path / "missing.json")


def test_questions_without_answers_measure_nothing(tmp_path):
    index = Index(index_of(squad_file(tmp_path), tmp_path / "index"))
    file = tmp_path / "q.json"
    file.write_text('[{"question": "why", "answers": []}]')
    with pytest.raises(DataError, match="no question has an answer"):
        evaluate_retrieval(index, read_questions(file), (1,))
