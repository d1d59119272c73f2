"""A pack as people see it: tokens as text, what is trained on, where documents begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from luban.core.log import say
from luban.data.batch import Batch
from luban.data.shards import Shards
from luban.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

COLOURS = ("cyan", "magenta", "yellow", "blue")  # documents of a row, in turn
PARTIAL = "\ufffd"  # what part of a character decodes to


def row_tokens(batch: Batch, row: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """A batch's row as plain data, one `{text, trained, document, position}` a token, padding left out.

    `trained` says whether the token itself is a target, so it is the loss mask one place to the left.
    """
    real = int((batch.documents[row] >= 0).sum())  # padding is at the end
    if not real:
        return []
    ids, trained, documents, positions = [], [], [], []
    for t in range(real):
        follows = t > 0 and batch.documents[row, t] == batch.documents[row, t - 1]
        ids.append(int(batch.tokens[row, t]))
        trained.append(bool(follows and batch.loss_mask[row, t - 1]))
        documents.append(int(batch.documents[row, t]))
        positions.append(int(batch.positions[row, t]))
        ends = t + 1 == real or batch.documents[row, t + 1] != batch.documents[row, t]
        if ends and not (t + 1 < real and batch.targets[row, t] == batch.tokens[row, t + 1]):
            ids.append(int(batch.targets[row, t]))  # a document's last token is a target only
            trained.append(bool(batch.loss_mask[row, t]))
            documents.append(documents[-1])
            positions.append(positions[-1] + 1)
    return _rows(ids, trained, documents, positions, tokenizer)


def document_tokens(shards: Shards, index: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One stored document as plain data, like `row_tokens`."""
    ids = shards.document(index).tolist()
    start, stop = shards.offsets[index], shards.offsets[index + 1]
    mask = [True] * len(ids) if shards.mask is None else (np.asarray(shards.mask[start:stop]) != 0).tolist()
    trained = [False, *mask[1:]]  # a document's first token is never a target
    return _rows(ids, trained, [0] * len(ids), list(range(len(ids))), tokenizer)


def document_spans(shards: Shards, index: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One stored document as stretches `{text, trained}` in order, which joined give its text."""
    spans: list[dict[str, Any]] = []
    for token in document_tokens(shards, index, tokenizer):
        if spans and spans[-1]["trained"] == token["trained"]:
            spans[-1]["text"] += token["text"]
        else:
            spans.append({"text": token["text"], "trained": token["trained"]})
    return spans


def _rows(
    ids: list[int], trained: list[bool], documents: list[int], positions: list[int], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    texts = token_texts(ids, tokenizer)
    return [
        {"text": text, "trained": t, "document": d, "position": p}
        for text, t, d, p in zip(texts, trained, documents, positions, strict=True)
    ]


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Each token's text; where several spell one character, the last of them has it.

    A token is decoded behind the one before it, since some decoders drop a first space.
    """
    texts: list[str] = []
    pending: list[int] = []
    before: list[int] = []
    for token in ids:
        pending.append(token)
        prefix = tokenizer.decode(before, skip_special=False)
        text = tokenizer.decode([*before, *pending], skip_special=False)[len(prefix) :]
        if text.endswith(PARTIAL) and len(pending) < 4:
            texts.append("")
            continue
        texts.append(text)
        before, pending = pending[-1:], []
    if pending and texts:
        texts[-1] = PARTIAL
    return texts


def show_on_stderr(*lines: str | Text) -> None:
    """Print on standard error as `say` does; plain text is dimmed."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    with console.capture() as captured:
        for line in lines:
            console.print(Text(line, style="dim") if isinstance(line, str) else line, soft_wrap=True)
    say(captured.get(), end="")


def coloured(tokens: Sequence[dict[str, Any]], limit: int | None = None) -> Text:
    """Tokens as terminal text: trained ones bold between « », documents in turning colours with ▌ before each.

    The marks stay where a terminal shows no colour. `limit`: tokens after which the rest is left out.
    """
    from rich.text import Text

    page = Text()
    shown = tokens if limit is None else tokens[:limit]
    document, inside = -1, False
    for token in shown:
        if inside and (not token["trained"] or token["document"] != document):
            page.append("»", style="green")
            inside = False
        if token["document"] != document:
            document = token["document"]
            page.append(("\n" if page else "") + "▌", style=f"bold {COLOURS[document % len(COLOURS)]}")
        if token["trained"] and not inside:
            page.append("«", style="green")
            inside = True
        page.append(token["text"], style="bold green" if inside else f"dim {COLOURS[document % len(COLOURS)]}")
    if inside:
        page.append("»", style="green")
    if len(shown) < len(tokens):
        page.append(f" … {len(tokens) - len(shown)} more tokens", style="dim")
    return page
