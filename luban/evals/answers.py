"""How a model answers held-out questions: the loss of the reference answers, exact answers, samples."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from luban.core.errors import DataError
from luban.core.seeding import derive
from luban.corpus.reader import Document
from luban.evals.likelihood import Window, negative_log_likelihood
from luban.evals.task import Material, Outcome
from luban.generate.sampling import Sampling
from luban.load.model import LoadedModel
from luban.models.base import require_next_token
from luban.serve.engine import Engine
from luban.tokenizer.chat import render

ANSWER_TOKENS = 64  # an answer that is longer is cut, and counts as wrong


class AnswerLoss:
    """Mean negative log-likelihood (nats) of a token of the reference answers and their end tokens."""

    needs = "conversations"

    def run(self, model: LoadedModel, material: Material, *, limit: int, precision: str) -> Outcome:
        cut = []
        for document in _draw(material.conversations, limit):
            rendered = render(_messages(document), model.need_tokenizer(), tools=document.tools)
            if len(rendered.token_ids) - 1 <= model.spec.context:
                cut.append(Window(rendered.token_ids[:-1], rendered.token_ids[1:], rendered.loss_mask[1:]))
        tokens = sum(sum(window.scored) for window in cut)
        if not tokens:
            raise DataError("answer_loss needs held-out conversations that fit the context: there are none")
        require_next_token(model.spec, "scoring text")
        nats = negative_log_likelihood(model.module, cut, precision=getattr(torch, precision), title="answer loss")
        return Outcome({"answer_loss": sum(nats) / tokens, "answers": len(cut), "answer_tokens": tokens})


class WhichModule:
    """Share of held-out “which module has X” questions answered word for word, beside the best constant answer."""

    needs = "conversations"

    def run(self, model: LoadedModel, material: Material, *, limit: int, precision: str) -> Outcome:
        asked = _draw([d for d in material.conversations if (d.meta or {}).get("task") == "which_module"], limit)
        if not asked:
            raise DataError("which_module needs held-out conversations of task which_module: the corpus has none")
        items = _answer(model, asked)
        right = [item["answer"].strip() == item["reference"].strip() for item in items]
        constant = Counter((d.meta or {})["answer_key"] for d in asked).most_common(1)[0][1]
        return Outcome(
            {
                "which_module_accuracy": sum(right) / len(items),
                "which_module_items": len(items),
                "which_module_majority": constant / len(items),
            },
            [{**item, "right": ok} for item, ok in zip(items, right, strict=True)],
        )


class Samples:
    """Twenty answers to held-out questions, for people to read."""

    needs = "conversations"

    def run(self, model: LoadedModel, material: Material, *, limit: int, precision: str) -> Outcome:
        items = _answer(model, _draw(material.conversations, min(limit or 20, 20)))
        return Outcome({"samples": len(items)}, items)


def _draw(documents: list[Document], limit: int) -> list[Document]:
    """`limit` documents by the hash of their id, the same ones every time; all of them for 0."""
    ranked = sorted(documents, key=lambda d: (derive(0, d.id), d.id))
    return ranked[:limit] if limit else ranked


def _messages(document: Document) -> list[dict[str, Any]]:
    if not document.messages:
        raise DataError(f"document {document.id} is no conversation")
    return document.messages


def _answer(model: LoadedModel, asked: list[Document]) -> list[dict[str, Any]]:
    """Greedy answers to the conversations' last question."""
    prompts = [_messages(document)[:-1] for document in asked]
    results = Engine(model).generate(prompts, Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0))
    return [
        {
            "id": d.id,
            "task": (d.meta or {}).get("task"),
            "question": _messages(d)[-2]["content"],
            "reference": _messages(d)[-1]["content"],
            "answer": r.text,
            "finish_reason": r.finish_reason,
        }
        for d, r in zip(asked, results, strict=True)
    ]
