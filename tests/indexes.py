"""Small texts with an index over them, and questions about them."""

from __future__ import annotations

import json
from pathlib import Path

from luban.retrieval.building import IndexConfig, build_index
from luban.retrieval.documents import DocumentReader
from luban.retrieval.passages.document import WholeDocument

PARAGRAPHS = {
    "Paris": "Paris is the capital of France. The Eiffel Tower was built in 1889.",
    "Basil": "Basil is a herb of the mint family, and grows in warm places.",
    "Join": "os.path.join joins path components with one separator between them.",
}
QUESTIONS = (("Paris", "When was the Eiffel Tower built?", "1889"), ("Basil", "Which family has basil?", "mint family"))


def squad_file(folder: Path) -> Path:
    """PARAGRAPHS and QUESTIONS in SQuAD's format."""
    articles = []
    for title, text in PARAGRAPHS.items():
        asked = [
            {"question": question, "answers": [{"text": answer, "answer_start": text.index(answer)}]}
            for where, question, answer in QUESTIONS
            if where == title
        ]
        articles.append({"title": title, "paragraphs": [{"context": text, "qas": asked}]})
    file = folder / "squad.json"
    file.write_text(json.dumps({"data": articles}))
    return file


def index_of(file: Path, out: Path) -> Path:
    """A BM25 index of a file's documents, one passage each."""
    build_index(DocumentReader([str(file)]), out, IndexConfig(rule=WholeDocument()))
    return out
