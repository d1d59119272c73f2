"""`luban rag index|search|ask|eval|train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from luban.cli import rag_index, rag_train
from luban.cli.subverbs import dispatch
from luban.core.arguments import parse, refuse_flags

if TYPE_CHECKING:
    from luban.retrieval.asking import Asks
    from luban.retrieval.index import Index, Searches
    from luban.retrieval.questions import Question

OF_RAG_MODELS = ("decoding", "beams")  # flags of answers by models of luban rag train


@dataclass(frozen=True, kw_only=True)
class SearchArgs:
    """What `luban rag search` takes."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]  # from luban rag index
    query: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]  # words or a question
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

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]  # from luban rag index
    # a run, a checkpoint, a Hugging Face directory, smollm2, …, or one of rag train
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    question: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION")]  # what is asked
    k: int | None = None  # passages that the model is given; none: 5, or as in training for one of rag train
    sentences: int | None = None  # of them together that the model reads, the best by BM25; none: whole passages
    quote: bool = False  # the answer is words of a passage as they stand there, by a grammar
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

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]  # from luban rag index
    # in SQuAD's or DPR's format, or a corpus of python:questions
    questions: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="QUESTIONS")]
    k: tuple[int, ...] = (1, 5, 20)  # passages among which a right one is looked for
    limit: int = 0  # questions at most (0: all)
    task: str = ""  # of a corpus: questions of this kind alone, such as which_module
    rerank: str | None = None  # a cross-encoder that puts the best passages in order, from luban rag train
    depth: int = 50  # passages that the cross-encoder reads
    out: Path | None = None  # write an evaluation artifact, too
    model: str | None = None  # answers the questions from the best passages: exact match, F1, attribution
    passages: int | None = None  # that the model is given; none: 5, or as in training for one of rag train
    sentences: int | None = None  # of them together that the model reads, the best by BM25; none: whole passages
    quote: bool = False  # the answer is words of a passage as they stand there, by a grammar
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
            "index": (rag_index.run, "texts → an index; documents added and removed"),
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
    from luban.core.log import say

    opened = _opened(args, argv)
    if (args.retriever or opened.retriever) != "hybrid":
        refuse_flags(argv, ("fusion",), f"in a search by {args.retriever or opened.retriever}: it is for hybrid ones")
    hits = _searched(opened, args).search(
        args.query, args.k, retriever=args.retriever, fusion=args.fusion, exact=args.exact
    )
    if args.json:
        print(json.dumps([hit.row() for hit in hits], ensure_ascii=False, indent=2))
        return
    for number, hit in enumerate(hits, 1):
        p = hit.passage
        print(f"{number}. {p.title}  ({hit.score:.3f}, {p.source} {p.start}-{p.stop})\n   {' '.join(p.text.split())}\n")
    if not hits:
        say(f"no passage of {args.index} holds a word of the query")


def _opened(args: SearchArgs | AskArgs | EvalArgs, argv: Sequence[str]) -> Index:
    """The index. Raises UsageError for flags that say nothing about it."""
    from luban.retrieval.index import Index

    if args.rerank is None:
        refuse_flags(argv, ("depth",), "without --rerank")
    opened = Index(args.index, encoder=args.encoder, device=args.device)
    if opened.retriever == "bm25":
        refuse_flags(argv, ("encoder",), f"with {args.index}, which was built with --encoder bm25")
    return opened


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
    from luban.core.log import warn
    from luban.retrieval.evaluation import evaluate_retrieval, write_evaluation
    from luban.retrieval.questions import read_questions
    from luban.retrieval.reranking import reranked

    if not args.k or min(args.k) < 1:
        raise UsageError("--k: numbers of passages from 1 are needed")
    if args.limit < 0:
        raise UsageError(f"--limit: 0 (all) or more questions, {args.limit} given")
    if args.model is None:
        refuse_flags(argv, ("passages", "sentences", "quote", *OF_RAG_MODELS), "without --model")
    questions = [q for q in read_questions(args.questions) if args.task in ("", q.task)][: args.limit or None]
    if not questions:
        raise UsageError(f"--task: {args.questions} holds no question of the kind '{args.task}'")
    opened = _opened(args, argv)
    rows = evaluate_retrieval(
        opened, questions, args.k, reranked=reranked(opened, args.rerank, args.device, args.depth)
    )
    if not any(row[f"top_{k}"] for row in rows for k in args.k):
        warn(f"no answer was found by any search: do {args.questions} and {args.index} belong together?")
    answers = None if args.model is None else _answers(opened, args, questions, argv)
    if args.out is not None:
        write_evaluation(args.out, args.index, args.questions, rows, answers)
    if args.json:
        print(
            json.dumps(
                rows if answers is None else {"retrieval": rows, "answers": answers}, ensure_ascii=False, indent=2
            )
        )
        return
    print(f"{'':<25}" + "".join(f"{f'top-{k}':>25}" for k in args.k) + f"{'MRR':>8}")
    for row in rows:
        cells = (
            f"{row[f'top_{k}']:.1%} ({row[f'top_{k}_interval'][0]:.1%}-{row[f'top_{k}_interval'][1]:.1%})"
            for k in args.k
        )
        print(f"{row['method']:<25}" + "".join(f"{cell:>25}" for cell in cells) + f"{row['mrr']:8.3f}")
    if answers is not None:
        attribution = "none cited" if answers["attribution"] is None else f"{answers['attribution']:.1%}"
        print(
            f"answers of {args.model}: exact match {answers['exact_match']:.1%}, F1 {answers['f1']:.1%}, "
            f"cited passage holds the answer {attribution}, without citation {answers['unsupported']:.1%}"
        )


def _answers(index: Index, args: EvalArgs, questions: Sequence[Question], argv: Sequence[str]) -> dict[str, Any]:
    """What the model makes of the questions."""
    from luban.retrieval.asking import ANSWER_TOKENS, evaluate_answers

    assert args.model is not None
    asker = _asker(index, args.model, args.passages, args, argv, "float32", ANSWER_TOKENS)
    return evaluate_answers(asker, questions)


def _asker(
    index: Index,
    model: str,
    k: int | None,
    args: AskArgs | EvalArgs,
    argv: Sequence[str],
    dtype: str,
    max_tokens: int,
) -> Asks:
    """Of a model of `luban rag train`, or of any other."""
    from luban.core.errors import UsageError
    from luban.load.model import load_model
    from luban.retrieval.asking import Asker
    from luban.retrieval.rag.asking import RagAsker
    from luban.retrieval.rag.model import is_rag, load_rag

    if k is not None and k < 1:
        raise UsageError(f"at least 1 passage is needed, {k} asked for")
    if args.beams < 1:
        raise UsageError(f"--beams: at least 1 is needed, {args.beams} given")
    if is_rag(model):
        if args.rerank is not None:
            raise UsageError("--rerank: a model of rag train weighs the passages that its own questions find")
        refuse_flags(
            argv, ("sentences", "quote"), f"with {model}, a model of luban rag train, which reads whole passages"
        )
        loaded = load_rag(model, args.device, dtype)
        return RagAsker(index, loaded, k, decoding=args.decoding, beams=args.beams, max_tokens=max_tokens)
    refuse_flags(argv, OF_RAG_MODELS, f"with {model}, which is no model of luban rag train")
    return Asker(
        _searched(index, args),
        load_model(model, args.device, dtype),
        k,
        max_tokens,
        sentences=args.sentences,
        quote=args.quote,
    )


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
        "luban rag ask index smollm2 'Who wrote the Analects?' --sentences 1 --quote   # for a small model\n"
        "luban rag ask index runs/chat 'Which module has Counter?' --k 3 --json",
    )
    from luban.core.log import say

    opened = _opened(args, argv)
    answer = _asker(opened, args.model, args.k, args, argv, args.dtype, args.max_tokens).ask(args.question)
    if args.json:
        print(json.dumps(answer.row(), ensure_ascii=False, indent=2))
        return
    print(answer.text)
    for citation in answer.citations:
        p = citation.hit.passage
        print(f"\n[{citation.mark}] {p.title}  ({p.source} {p.start}-{p.stop})\n    {' '.join(p.text.split())}")
    if not answer.citations and answer.read:
        found = "\n".join(f"  {hit.passage.title}  ({hit.passage.source})" for hit in answer.read)
        say(f"What the model wrote (--json shows it) isn't borne out by the passages that it was given:\n{found}")
