"""Which head a decoder's directory holds, by the class that `architectures` names: `…ForCausalLM`,
`…ForSequenceClassification` (classes, or with one label a reward) or `…Model`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from luban.models.convert.family import Fields, Pair
from luban.models.head import Classes, Head, Hidden, LanguageModel, Value
from luban.models.spec import ModelSpec

HEADS = (LanguageModel, Classes, Value, Hidden)


def read_head(fields: Fields, base: str, *, tied: bool) -> dict[str, Any]:
    """Our fields `head` and `tied_head`, where theirs call the body `base` and tie by default or not.

    A body alone that ties its table is read as a language model, since nothing is missing for one.
    """
    tied = fields.get("tie_word_embeddings", tied)
    name = (fields.get("architectures", None) or [""])[0]
    if name == f"{base}ForSequenceClassification":
        labels = len(fields.get("id2label", (0, 1)))
        reward = Value(bias=False)
        return {"head": reward if labels == 1 else Classes(count=labels, pooling="last", dense=False, bias=False)}
    return {"head": Hidden()} if name == f"{base}Model" and not tied else {"tied_head": tied}


def write_head(head: Head, base: str, language_model: str | None = None) -> dict[str, Any] | None:
    """The fields of config.json that say so, or None where the class of theirs has another head."""
    if head == LanguageModel():
        return {"architectures": [language_model or f"{base}ForCausalLM"]}
    if head == Hidden():
        return {"architectures": [f"{base}Model"]}
    count = head.count if isinstance(head, Classes) else 1
    plain = (Value(bias=False), Classes(count=count, pooling="last", dense=False, bias=False))
    labels = {str(i): f"LABEL_{i}" for i in range(count)}
    return {"architectures": [f"{base}ForSequenceClassification"], "id2label": labels} if head in plain else None


def head_pairs(spec: ModelSpec) -> Iterator[Pair]:
    """The head's tensors."""
    if isinstance(spec.head, (Classes, Value)):
        yield Pair("readout.output.weight", "score.weight")
    elif isinstance(spec.head, LanguageModel) and not spec.tied_head:
        yield Pair("readout.weight", "lm_head.weight")
