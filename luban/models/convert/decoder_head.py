"""Which head a decoder's directory holds, by the class that `architectures` names: `…ForCausalLM`,
`…ForSequenceClassification` (classes, or with one label a reward), `…ForTokenClassification`,
`…ForQuestionAnswering` or `…Model`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from luban.core.errors import UnsupportedError
from luban.models.convert.base import Pair
from luban.models.convert.fields import Fields
from luban.models.head.base import Head
from luban.models.head.hidden import Hidden
from luban.models.head.language_model import LanguageModel
from luban.models.head.rows import Classes, Value
from luban.models.head.tokens import Span, TokenClasses
from luban.models.spec import ModelSpec

HEADS = (LanguageModel, Classes, Value, TokenClasses, Span, Hidden)
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")  # however the rest of the class is called: copies rename it
KINDS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")


def read_head(fields: Fields, base: str, *, tied: bool, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """Our fields `head` and `tied_head`, where theirs call the body `base` and tie by default or not.

    A body alone that ties its table is read as a language model, since nothing is missing for one.
    Raises UnsupportedError for the class of another head.
    """
    tied = fields.get("tie_word_embeddings", tied)
    name = fields.architecture(f"{base}ForCausalLM")
    if name.endswith(LANGUAGE_MODELS) or (name == f"{base}Model" and tied):
        return {"tied_head": tied}
    labels = fields.labels()
    classes = Classes(count=labels, pooling="last", dense=False, bias=False)
    heads = (Value(bias=False) if labels == 1 else classes, TokenClasses(count=labels), Span(), Hidden())
    known = {base + kind: head for kind, head in zip(KINDS, heads, strict=True) if kind in kinds}
    if name not in known:
        raise UnsupportedError(
            f"config.json names the architecture {name}; known are a language "
            f"model (…{' or …'.join(LANGUAGE_MODELS)}), {', '.join(known)}"
        )
    return {"head": known[name]}


def write_head(head: Head, base: str, language_model: str | None = None) -> dict[str, Any] | None:
    """The fields of config.json that say so, or None where the class of theirs has another head."""
    if head == LanguageModel():
        return {"architectures": [language_model or f"{base}ForCausalLM"]}
    count = head.count if isinstance(head, (Classes, TokenClasses)) else 1
    kinds = {
        Classes(count=count, pooling="last", dense=False, bias=False): KINDS[0],
        Value(bias=False): KINDS[0],
        TokenClasses(count=count): KINDS[1],
        Span(): KINDS[2],
        Hidden(): KINDS[3],
    }
    if head not in kinds:
        return None
    labels = {"id2label": {str(i): f"LABEL_{i}" for i in range(count)}} if kinds[head] in KINDS[:2] else {}
    return {"architectures": [base + kinds[head]], **labels}


def head_pairs(spec: ModelSpec, token_classes: str = "score") -> Iterator[Pair]:
    """The head's tensors; theirs keep the classes of tokens under `token_classes`."""
    if isinstance(spec.head, (Classes, Value)):
        yield Pair("head.output.weight", "score.weight")
    elif isinstance(spec.head, (TokenClasses, Span)):
        name = "qa_outputs" if isinstance(spec.head, Span) else token_classes
        yield from (Pair(f"head.output.{kind}", f"{name}.{kind}") for kind in ("weight", "bias"))
    elif isinstance(spec.head, LanguageModel) and not spec.tied_head:
        yield Pair("head.weight", "lm_head.weight")
