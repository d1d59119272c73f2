"""What a small model of `luban rag train` is made of."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import write_checkpoint

import luban
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.retrieval.building import IndexConfig, build_index
from luban.retrieval.documents import DocumentReader
from luban.retrieval.passages.document import WholeDocument
from luban.retrieval.rag.train import RagRecipe

FACTS = {"tin": "grey", "sun": "yellow", "sea": "blue", "coal": "black", "snow": "white", "leaf": "green"}


def write_facts(folder: Path, *, two_sided: bool) -> RagRecipe:
    """An index of `FACTS` by a sentence encoder of random weights, questions, and a generator: an encoder–decoder, or a decoder;
    returns a recipe that trains it."""
    rows = [{"text": f"{thing} is {colour}"} for thing, colour in FACTS.items()]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question": f"what is {thing}?", "answers": [colour]} for thing, colour in FACTS.items()]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"vocab_size": 272, "width": 32, "mixer": Grouped(heads=2), "feedforward": SwiGLU(width=32)}
    body = {"body": EncoderDecoderBody(decoder_start=2)} if two_sided else {}
    write_checkpoint(folder / "generator", uniform(layers=1, context=96, **common, **body))
    if two_sided:
        (folder / "generator" / "tokenizer" / "chat_template.jinja").unlink()
    luban.export_model(
        luban.load_model(write_checkpoint(folder / "plain", uniform(layers=1, context=64, **common), 1)),
        folder / "encoder",
    )
    config = IndexConfig(retriever="dense", encoder=str(folder / "encoder"), rule=WholeDocument())
    build_index(DocumentReader([str(folder / "texts.jsonl")]), folder / "index", config)
    return RagRecipe(
        data=folder / "questions.jsonl",
        index=folder / "index",
        model=str(folder / "generator"),
        k=2,
        batch_size=3,
        epochs=2,
        lr=1e-3,
        retriever_lr=1e-3,
        answer_tokens=8,
        heldout=0.0,
    )
