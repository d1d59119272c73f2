"""A foreign vocabulary → a tokenizer artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from luban.core.artifact import MANIFEST, ArtifactWriter, as_parent
from luban.core.errors import DataError
from luban.core.hashing import file_sha256
from luban.tokenizer.importing import FORMATS
from luban.tokenizer.tokenizer import FILE, Tokenizer, load_tokenizer

VOCABULARIES = (  # in the order in which they are looked for
    "tekken.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)


def import_tokenizer(path: str | Path, out: str | Path, chat_template: str | None = None) -> Tokenizer:
    """Read the vocabulary file (or the directory that holds one) at `path` and write an artifact to `out`.

    Args:
        chat_template: Jinja source that replaces the vocabulary's own.

    Raises:
        DataError: nothing there, or no known format.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in (FILE, *VOCABULARIES) if (path / name).is_file()), path / FILE)
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    kind = format_of(path)
    model, settings = FORMATS[kind](path)
    made = Tokenizer(model, settings if chat_template is None else replace(settings, chat_template=chat_template))
    config = {"imported": kind, "source": path.name, "source_sha256": file_sha256(path)}
    with ArtifactWriter(out, kind="tokenizer", config=config) as art:
        made.save(art.path)
        art.figures.update(vocab_size=made.vocab_size)
    return load_tokenizer(out)


def replace_template(tokenizer: Tokenizer, source: str, out: str | Path) -> Tokenizer:
    """Write `tokenizer` with another chat template as an artifact of its own, whose parent it is where it is one."""
    known = tokenizer.path is not None and (tokenizer.path / MANIFEST).is_file()
    parents = (as_parent("vocabulary", tokenizer.path),) if known and tokenizer.path else ()
    made = tokenizer.with_template(source)
    with ArtifactWriter(out, kind="tokenizer", config={"replaced": "chat_template"}, parents=parents) as art:
        made.save(art.path)
        art.figures.update(vocab_size=made.vocab_size)
    return load_tokenizer(out)


def format_of(path: Path) -> str:
    """The entry of FORMATS for a file, by its name and first bytes."""
    head = path.open("rb").read(64)
    if path.suffix == ".gguf" or head.startswith(b"GGUF"):
        return "gguf"
    if path.name == "vocab.json":
        return "gpt2"
    if path.name == "vocab.txt":
        return "bert"
    if path.suffix == ".json" and path.name.startswith("tekken"):
        return "tekken"
    if path.suffix == ".json":
        return "tokenizer.json"
    ranks = head.split(b"\n")[0].split(b" ")[-1].strip().isdigit()  # LLaMA 3 calls its rank file tokenizer.model
    if path.suffix == ".tiktoken" or (path.suffix == ".model" and ranks):
        return "tiktoken"
    if path.suffix == ".model":
        return "sentencepiece"
    raise DataError(
        f"{path} is no known vocabulary: tokenizer.json, vocab.json with its merges, BERT's vocab.txt, "
        f"a .tiktoken rank file, Mistral's tekken.json, a SentencePiece .model or a .gguf is needed"
    )
