"""`luban tokenizer train|import|encode|report`."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from luban.cli.subverbs import dispatch
from luban.core.arguments import parse
from luban.core.errors import DataError
from luban.core.log import Bar

if TYPE_CHECKING:
    from luban.tokenizer.report import Sample
    from luban.tokenizer.tokenizer import Tokenizer

LINES = 16384  # encoded at a time


@dataclass(frozen=True)
class TrainArgs:
    corpora: tyro.conf.Positional[tuple[Path, ...]]  # corpora, from luban corpus build
    out: Path  # directory to make
    algorithm: str = "bpe"  # bpe, wordpiece, unigram, chinese (signs alone, the rest bpe), charbpe (LLaMA's) or char
    vocab_size: int = 4096  # ids in all, special tokens counted
    digits: str = "groups"  # how digits are cut: groups of up to three, single, or whole runs
    white_runs: int = 0  # runs of up to so many blanks, tabs or line ends are one token each, as code wants
    reserved: int = 9  # special tokens kept for later
    chat_template: Path | None = None  # Jinja file, in place of the built-in one for system, user and assistant
    verify: bool = False  # read and hash the corpora's files first, and compare with what was written


@dataclass(frozen=True)
class ImportArgs:
    # tokenizer.json, vocab.json with merges, vocab.txt, .tiktoken, tekken.json, SentencePiece .model, .gguf, their
    # folder, or smollm2
    file: tyro.conf.Positional[Path]
    out: Path  # directory to make
    chat_template: Path | None = None  # Jinja file, in place of the vocabulary's own


@dataclass(frozen=True)
class EncodeArgs:
    tokenizer: tyro.conf.Positional[Path]  # a tokenizer, a run, a Hugging Face directory, or smollm2
    text: str | None = None  # text to encode; standard input by default
    pieces: bool = False  # show each token's text beside its id
    lines: bool = False  # every line is a text of its own: they are encoded in parallel, one line of ids each


@dataclass(frozen=True)
class ReportArgs:
    tokenizer: tyro.conf.Positional[Path]  # a tokenizer, a run, a Hugging Face directory, or smollm2
    files: tyro.conf.Positional[tuple[Path, ...]] = ()  # UTF-8 text files or corpora to measure it on
    beside: tuple[str, ...] = ()  # NAME=PATH of other vocabularies: vocab.json, tokenizer.model, any that import reads
    megabytes: float = 64  # of each corpus, at the most


def run(argv: Sequence[str]) -> int | None:
    """`luban tokenizer …`"""
    return dispatch(
        "tokenizer",
        {
            "train": (train, "learn a vocabulary from a corpus"),
            "import": (import_, "a vocabulary that another library made"),
            "encode": (encode, "text → token ids"),
            "report": (report, "how well a vocabulary fits texts"),
        },
        argv,
    )


def train(argv: Sequence[str]) -> None:
    """`luban tokenizer train CORPUS… --out DIR`"""
    args = parse(
        TrainArgs,
        argv,
        verb="tokenizer train",
        about="Learn a vocabulary from the training split of corpora.",
        examples="luban tokenizer train corpus --out tok --algorithm bpe --vocab-size 4096\n"
        "luban tokenizer train corpus questions --out tok\n"
        "luban tokenizer train code --out tok --digits single --white-runs 16 --reserved 64",
    )
    from luban.core.artifact import as_parent, open_artifact
    from luban.core.log import progress, say
    from luban.tokenizer.cutting import Cutting
    from luban.tokenizer.train import MOST_BYTES, train_tokenizer

    if not args.corpora:
        raise DataError("luban tokenizer train needs at least one corpus, from luban corpus build")
    held = [open_artifact(corpus, "corpus", verify=args.verify).figures["train"] for corpus in args.corpora]
    share = min(0.9 * MOST_BYTES / max(sum(h["bytes"] for h in held), 1), 1.0)  # of what is too large, a sample
    with progress("reading texts", total=sum(h["documents"] for h in held), unit="docs") as bar:
        texts = itertools.chain.from_iterable(_texts(corpus, share, bar) for corpus in args.corpora)
        made = train_tokenizer(
            texts,
            args.out,
            algorithm=args.algorithm,
            vocab_size=args.vocab_size,
            cut=Cutting(digits=args.digits, white_runs=args.white_runs),
            reserved=args.reserved,
            chat_template=_template(args.chat_template),
            parents=tuple(as_parent("corpus", corpus) for corpus in args.corpora),
        )
    say(f"tokenizer {args.out}: {args.algorithm}, {made.vocab_size} tokens")


def _texts(corpus: Path, share: float, bar: Bar) -> Iterator[str]:
    """The texts of a share of the documents, chosen by the hash of their ids."""
    from luban.core.seeding import derive
    from luban.corpus.reader import read_corpus

    for document in read_corpus(corpus):
        if share == 1.0 or derive(0, "tokenizer", document.id) < share * 2**63:
            yield from document.contents()
        bar.advance()


def import_(argv: Sequence[str]) -> None:
    """`luban tokenizer import FILE --out DIR`"""
    args = parse(
        ImportArgs,
        argv,
        verb="tokenizer import",
        about="Read a vocabulary that another library made.",
        examples="luban tokenizer import gpt2/vocab.json --out tok\n"
        "luban tokenizer import llama/tokenizer.model --out tok --chat-template tools.jinja",
    )
    from luban.core.log import say
    from luban.load.tokenizer import vocabulary_path
    from luban.tokenizer.importing.artifact import import_tokenizer

    made = import_tokenizer(vocabulary_path(args.file), args.out, _template(args.chat_template))
    say(f"tokenizer {args.out}: imported from {args.file}, {made.vocab_size} tokens")


def _template(path: Path | None) -> str | None:
    from luban.tokenizer.template import read_template

    return None if path is None else read_template(path)


def encode(argv: Sequence[str]) -> None:
    """`luban tokenizer encode DIR --text …`"""
    args = parse(
        EncodeArgs,
        argv,
        verb="tokenizer encode",
        about="Print the token ids of a text. Special tokens that are spelled in it stay plain text, as in training and serving.",
        examples="luban tokenizer encode tok --text 'import os'\necho hello | luban tokenizer encode tok\n"
        "luban tokenizer encode tok --lines < texts.txt > ids.txt",
    )
    from luban.load.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    if args.lines:
        texts = iter(sys.stdin if args.text is None else args.text.splitlines())
        while batch := [line.removesuffix("\n") for line in itertools.islice(texts, LINES)]:
            print("\n".join(" ".join(map(str, ids)) for ids in tokenizer.encode_batch(batch)))
        return
    ids = tokenizer.encode(sys.stdin.read() if args.text is None else args.text)
    if args.pieces:
        print("\n".join(f"{i}\t{tokenizer.decode([i], skip_special=False)!r}" for i in ids))
    else:
        print(" ".join(map(str, ids)))


def report(argv: Sequence[str]) -> None:
    """`luban tokenizer report DIR FILES…`"""
    args = parse(
        ReportArgs,
        argv,
        verb="tokenizer report",
        about="Measure how well a vocabulary fits texts.",
        examples="luban tokenizer report tok notes.txt code.py\n"
        "luban tokenizer report tok corpus --beside gpt2=gpt2/vocab.json llama=llama/tokenizer.model",
    )
    from rich.console import Console

    from luban.load.tokenizer import load_tokenizer
    from luban.tokenizer.report import measure
    from luban.tokenizer.report_tables import show

    if not args.files:
        raise DataError("luban tokenizer report needs at least one text file or corpus to measure on")
    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        beside = {name: _other(path, Path(folder) / name) for name, path in map(_named, args.beside)}
        samples = itertools.chain.from_iterable(_samples(path, args.megabytes) for path in args.files)
        found = measure(tokenizer, samples, beside)
    wide = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    show(found, str(args.tokenizer), list(beside), wide)


def _named(word: str) -> tuple[str, Path]:
    name, _, path = word.rpartition("=")
    return name or Path(path).parent.name or path, Path(path)


def _other(path: Path, folder: Path) -> Tokenizer:
    """A tokenizer directory as it is, any other vocabulary imported for the moment."""
    from luban.load.tokenizer import load_tokenizer, vocabulary_path
    from luban.tokenizer.importing.artifact import import_tokenizer

    path = vocabulary_path(path)
    return load_tokenizer(path) if path.is_dir() or not path.exists() else import_tokenizer(path, folder)


def _samples(path: Path, megabytes: float) -> Iterator[Sample]:
    """The texts of a file or of a corpus's training split, with their language and domain."""
    from luban.core.artifact import MANIFEST
    from luban.corpus.reader import read_corpus
    from luban.tokenizer.report import DOMAINS, Sample, file_texts

    if not (path / MANIFEST).is_file():
        domain = DOMAINS.get(path.suffix, "prose")
        language = None
        for text in file_texts(path):
            language = language or _language(text, domain)
            yield Sample(text, path.name, language, domain)
        return
    size = 0
    for document in read_corpus(path):
        size += document.bytes
        if size > megabytes * 1e6:
            return
        source = document.source.split("/")[0]
        yield from (Sample(text, path.name, document.lang or "unknown", source) for text in document.contents())


def _language(text: str, domain: str) -> str:
    from luban.core.errors import MissingExtra
    from luban.corpus.steps.language import identify

    try:
        return domain if domain in ("code", "data") else identify(text) or "unknown"
    except MissingExtra:
        return "unknown"
