"""`luban data pack`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro

from luban.cli.subverbs import dispatch
from luban.core.arguments import parse

SAMPLES = 2  # conversations shown with their mask
SAMPLE_TOKENS = 200  # of each


@dataclass(frozen=True)
class PackArgs:
    corpus: tyro.conf.Positional[Path]  # a corpus, from luban corpus build
    tokenizer: Path  # a tokenizer, a run, or a Hugging Face directory
    out: Path  # directory to make


def run(argv: Sequence[str]) -> int | None:
    """`luban data …`"""
    return dispatch("data", {"pack": (pack, "a corpus → shards of tokens")}, argv)


def pack(argv: Sequence[str]) -> None:
    """`luban data pack CORPUS --tokenizer DIR --out DIR`"""
    args = parse(PackArgs, argv, verb="data pack",
                 about="Tokenise a corpus into memory-mapped shards; conversations get their loss mask.",
                 examples="luban data pack corpus --tokenizer tok --out shards")  # fmt: skip
    from luban.core.artifact import as_parent, open_artifact
    from luban.core.log import say
    from luban.core.units import count
    from luban.corpus.reader import read_corpus
    from luban.corpus.split import SPLITS
    from luban.data.pack import pack as pack_shards

    held = open_artifact(args.corpus, "corpus").figures
    splits = {split: read_corpus(args.corpus, split, verify=False) for split in SPLITS}
    figures = pack_shards(splits, args.tokenizer, args.out, parents=(as_parent("corpus", args.corpus),),
                          total=sum(held[split]["documents"] for split in SPLITS))  # fmt: skip
    if figures["train"]["conversations"]:
        _show_masks(args.out)
    kept = ", ".join(f"{split} {figures[split]['documents']} documents, {count(figures[split]['tokens'])} tokens, "
                     f"{count(figures[split]['trained'])} trained on" for split in SPLITS)  # fmt: skip
    say(f"shards {args.out}: {kept}")


def _show_masks(path: Path) -> None:
    from rich.console import Console

    from luban.data.shards import Shards
    from luban.data.show import coloured, document_tokens
    from luban.tokenizer.tokenizer import load_tokenizer

    console, shards = Console(stderr=True, highlight=False), Shards.open(path)
    tokenizer = load_tokenizer(path / "tokenizer")
    console.print("What is trained on stands between « and »:", style="dim")
    documents = (document_tokens(shards, i, tokenizer) for i in range(shards.documents))
    masked = (tokens for tokens in documents if not all(token["trained"] for token in tokens[1:]))
    for tokens in islice(masked, SAMPLES):
        console.print(coloured(tokens, SAMPLE_TOKENS))
