"""`luban data …`: shards of tokens here, data for alignment in `luban.cli.data_alignment`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

import luban.cli.data_alignment as alignment
from luban.cli.subverbs import dispatch
from luban.core.arguments import parse

if TYPE_CHECKING:
    from luban.data.shards import Shards

LEGEND = "What is trained on stands between « and »:"
SAMPLES = 2  # conversations shown with their mask
SAMPLE_TOKENS = 200  # of each


@dataclass(frozen=True)
class PackArgs:
    corpora: tyro.conf.Positional[tuple[Path, ...]]  # corpora, from luban corpus build or mix
    tokenizer: Path  # a tokenizer, a run, a Hugging Face directory, or smollm2
    out: Path  # directory to make
    verify: bool = False  # read and hash the corpus's files first, and compare with what was written


@dataclass(frozen=True)
class ShowArgs:
    shards: tyro.conf.Positional[Path]  # shards, from luban data pack or in the RUN.data of a fine-tuning
    limit: int = 10  # documents to show (0: all)
    split: Literal["train", "heldout"] = "train"  # which part
    train_on: Literal["answers", "all"] = "answers"  # of conversations, as luban sft was told
    json: bool = False  # a JSON line a document, [{"text": …, "trained": …}, …], in full


def run(argv: Sequence[str]) -> int | None:
    """`luban data …`"""
    return dispatch(
        "data",
        {
            "pack": (pack, "a corpus → shards of tokens"),
            "feedback": (alignment.feedback, "scores, rankings and critiques → data for sft, reward and dpo"),
            "instruct": (alignment.instruct, "instructions and answers written by a model: Alpaca, Self-Instruct"),
            "sharegpt": (alignment.sharegpt, "ShareGPT's conversations, cleaned and cut at the borders of turns"),
            "revise": (alignment.revise, "answers criticised and revised by a model over principles"),
            "ghost_attention": (alignment.ghost_attention, "dialogues that keep an instruction given at their start"),
            "overoptimisation": (alignment.overoptimisation, "gold reward against distance, fitted by Gao's forms"),
            "show": (show, "documents of shards, and what of them is trained on"),
        },
        argv,
    )


def pack(argv: Sequence[str]) -> None:
    """`luban data pack CORPUS… --tokenizer DIR --out DIR`"""
    args = parse(
        PackArgs,
        argv,
        verb="data pack",
        about="Tokenise corpora, one behind the other, into memory-mapped shards; conversations get their loss mask.\n\n"
        "A training document that another of the corpora holds out is left out. For shares and epochs: luban corpus mix.",
        examples="luban data pack corpus --tokenizer tok --out shards\n"
        "luban data pack books code --tokenizer tok --out shards",
    )
    from luban.core.artifact import as_parent, open_artifact
    from luban.core.errors import UsageError
    from luban.core.log import say
    from luban.core.units import count
    from luban.corpus.several import read_corpora
    from luban.corpus.split import SPLITS
    from luban.data.pack import pack as pack_shards
    from luban.load.tokenizer import load_tokenizer

    if not args.corpora:
        raise UsageError("name at least one corpus to pack (see luban data pack --help)")
    held = [open_artifact(path, "corpus", verify=args.verify).figures for path in args.corpora]
    figures = pack_shards(
        read_corpora(args.corpora),
        load_tokenizer(args.tokenizer),
        args.out,
        parents=tuple(as_parent("corpus", path) for path in args.corpora),
        total=sum(figures[split]["documents"] for figures in held for split in SPLITS),
    )
    if figures["train"]["conversations"]:
        _show_masks(args.out)
    kept = ", ".join(
        f"{split} {figures[split]['documents']} documents, {count(figures[split]['tokens'])} tokens, "
        f"{count(figures[split]['trained'])} trained on"
        for split in SPLITS
    )
    say(f"shards {args.out}: {kept}")


def _show_masks(path: Path) -> None:
    from luban.data.shards import Shards
    from luban.data.show import coloured, document_tokens, show_on_stderr
    from luban.tokenizer.tokenizer import load_tokenizer

    shards, tokenizer = Shards.open(path), load_tokenizer(path / "tokenizer")
    documents = (document_tokens(shards, i, tokenizer) for i in range(shards.documents))
    masked = (tokens for tokens in documents if not all(token["trained"] for token in tokens[1:]))
    show_on_stderr(LEGEND, *(coloured(tokens, SAMPLE_TOKENS) for tokens in islice(masked, SAMPLES)))


def show(argv: Sequence[str]) -> None:
    """`luban data show SHARDS --limit N [--json]`"""
    args = parse(
        ShowArgs,
        argv,
        verb="data show",
        about="Show documents of shards, and which of their tokens are trained on.",
        examples="luban data show shards --limit 3\n"
        "luban data show runs/chat.data/shards-0123456789ab --limit 20 --json > masks.jsonl\n"
        "luban data show runs/chat.data/shards-0123456789ab --train-on all   # of a run that was trained with --train-on all",
    )
    from rich.console import Console

    from luban.core.errors import UsageError
    from luban.data.shards import Shards
    from luban.data.show import coloured, document_spans, document_tokens
    from luban.tokenizer.tokenizer import load_tokenizer

    if args.limit < 0:
        raise UsageError(f"--limit must be at least 0, {args.limit} given")
    shards = Shards.open(args.shards, args.split)
    if args.train_on == "all":
        if not shards.has_mask:
            raise UsageError(f"--train-on: {args.shards} holds no conversations, and all of it is trained on anyway")
        shards = replace(shards, mask=None)
    tokenizer = load_tokenizer(args.shards / "tokenizer")
    if args.json:
        for index in _first(shards, args.limit):
            print(json.dumps(document_spans(shards, index, tokenizer), ensure_ascii=False))
        return
    console = Console(highlight=False)
    console.print(LEGEND, style="dim")
    for index in _first(shards, args.limit):
        console.print(coloured(document_tokens(shards, index, tokenizer)), soft_wrap=True)


def _first(shards: Shards, limit: int) -> range:
    """The indexes of the first documents."""
    return range(min(limit or shards.documents, shards.documents))
