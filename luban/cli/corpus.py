"""`luban corpus build|mix|ngram|classifier`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from luban.cli.subverbs import dispatch
from luban.core.arguments import parse


@dataclass(frozen=True)
class BuildArgs:
    sources: tyro.conf.Positional[tuple[str, ...]]  # files, folders, globs, KIND:PATH or a built-in source
    out: Path  # directory to make
    heldout: float = 0.05  # fraction kept from training
    seed: int = 0  # of the held-out split
    steps: str = "exact"  # what is done to the documents, in order: names with commas between, or nothing
    workers: int = 1  # processes that share the work; the result is the same for any number
    on: str = "local"  # where they run: local, or ray for a cluster
    licence: tuple[str, ...] = ()  # SPDX name of all sources, or SOURCE=NAME of one; a forbidden export is refused
    text_field: str = "text"  # field of JSON, Parquet and CSV rows that holds the text
    bad_share: float = 0.05  # share of unusable records from which the build is refused


@dataclass(frozen=True)
class MixArgs:
    recipe: tyro.conf.Positional[str]  # a TOML file with [[part]] tables, or llama
    out: Path  # directory to make
    parts: Path | None = None  # folder from which the recipe's paths are seen; by default the current one
    bytes: int = 0  # training bytes to mix; 0 is as many as weights and epochs allow
    verify: bool = False  # read and hash the parts' files first, and compare with what was written


@dataclass(frozen=True)
class NgramArgs:
    corpus: tyro.conf.Positional[Path]  # text of the kind that is wanted
    out: Path  # directory to make


@dataclass(frozen=True)
class ClassifierArgs:
    good: tyro.conf.Positional[Path]  # a corpus of the kind that is wanted, such as pages Wikipedia refers to
    other: tyro.conf.Positional[Path]  # a corpus of any text
    out: Path  # directory to make
    seed: int = 0  # of the order in which texts are learned from


def run(argv: Sequence[str]) -> int | None:
    """`luban corpus …`"""
    return dispatch(
        "corpus",
        {
            "build": (build, "sources → a clean corpus with a held-out split"),
            "mix": (mix, "corpora → one corpus, by weight and epochs"),
            "ngram": (ngram, "a corpus → a model of its language, for the step perplexity"),
            "classifier": (classifier, "good and other text → a judge, for the step classifier"),
        },
        argv,
    )


def build(argv: Sequence[str]) -> None:
    """`luban corpus build SOURCE… --out DIR`"""
    args = parse(
        BuildArgs,
        argv,
        verb="corpus build",
        about=_about_building(),
        examples="luban corpus build notes/ 'books/*.txt' --out corpus\n"
        "luban corpus build python:stdlib --out corpus --heldout 0.05 --seed 0\n"
        "luban corpus build 'dumps/*.jsonl' --out corpus --steps c4,gopher,exact,minhash --workers 8",
    )
    from luban.core.log import say
    from luban.core.units import bytes_
    from luban.corpus.build import build_corpus

    figures = build_corpus(
        args.sources,
        args.out,
        heldout=args.heldout,
        seed=args.seed,
        steps=[name for name in map(str.strip, args.steps.split(",")) if name],
        workers=args.workers,
        on=args.on,
        bad_share=args.bad_share,
        licences=_licences(args.licence),
        text_field=args.text_field,
    )
    kept = ", ".join(
        f"{split} {figures[split]['documents']} documents, {bytes_(figures[split]['bytes'])}"
        for split in ("train", "heldout")
    )
    say(f"corpus {args.out}: {kept}")
    for row in figures["waterfall"]:
        say(f"  {row['step']:<10} {row['documents']} documents, {bytes_(row['bytes'])}")
    for reason, dropped in figures["dropped"].items():
        say(f"  dropped by {reason}: {dropped['documents']} documents, {bytes_(dropped['bytes'])}")
    for step, shown in figures["changes_samples"].items():
        say(f"  changed by {step}, such as {shown[0]['text']}")
    for what, amount in figures["unusable"].items():
        say(f"  unusable: {amount} {what}, such as {figures['unusable_samples'][what][0]}")
    for what, amount in figures["counts"].items():
        say(f"  {what.replace('_', ' ')}: {amount}")


def _about_building() -> str:
    """Text of `--help` before the options: the available sources and steps."""
    from luban.corpus.sources import SOURCES
    from luban.corpus.steps import STEPS

    kinds = [name for name in SOURCES if ":" not in name]
    return (
        "Read sources, drop duplicates, hold a part out, and write Parquet files.\n\n"
        f"Built-in sources: {', '.join(name for name in SOURCES if ':' in name)}\n\n"
        f"Kinds of sources, for KIND:PATH (without a kind, the path and its ending tell): {', '.join(kinds)}\n\n"
        f"Steps, for --steps (described in docs/CORPUS.md): {', '.join(STEPS)}"
    )


def _about_mixing() -> str:
    """Text of `--help` before the options: the fields of a recipe and an example of one."""
    from luban.core.arguments import describe_fields
    from luban.corpus.mixture import EXAMPLE, Part

    fields = "\n".join(
        f"  {name:<8} {comment}{f' (default {default})' if default else ''}"
        for name, _, default, comment in describe_fields(Part)
    )
    return (
        f"Mix corpora by weight and epochs, as a recipe says: a TOML file of [[part]] tables, one a corpus, with the fields\n"
        f"{fields}\n\nA recipe:\n\n{textwrap.indent(EXAMPLE, '  ')}"
    )


def _licences(words: tuple[str, ...]) -> dict[str, str]:
    """`NAME` and `SOURCE=NAME` as source → licence, "" for every other source."""
    pairs = [word.rpartition("=") for word in words]
    return {source: licence for source, _, licence in pairs}


def mix(argv: Sequence[str]) -> None:
    """`luban corpus mix RECIPE --out DIR`"""
    args = parse(
        MixArgs,
        argv,
        verb="corpus mix",
        about=_about_mixing(),
        examples="luban corpus mix llama --parts corpora --out corpora/llama\n"
        "luban corpus mix mixture.toml --out mixed --bytes 1000000000",
    )
    import luban.recipes
    from luban.core.arguments import find_recipe
    from luban.core.config import load_toml
    from luban.core.log import say
    from luban.core.units import bytes_
    from luban.corpus.mixture import mix as mix_corpora
    from luban.corpus.mixture import parts_of

    recipe = find_recipe(args.recipe, Path(luban.recipes.__file__).parent / "mixtures")
    figures = mix_corpora(parts_of(load_toml(recipe), args.parts), args.out, size=args.bytes, verify=args.verify)
    say(f"corpus {args.out}: {figures['train']['documents']} documents, {bytes_(figures['train']['bytes'])}")
    for name, share in figures["shares"].items():
        say(f"  {name:<16} {share:6.1%}")


def ngram(argv: Sequence[str]) -> None:
    """`luban corpus ngram CORPUS --out DIR`"""
    args = parse(
        NgramArgs,
        argv,
        verb="corpus ngram",
        about="Learn a 3-gram language model from a corpus.",
        examples="luban corpus ngram wikipedia --out models/wikipedia\n"
        "luban corpus build web/ --steps perplexity=models/wikipedia@500 --out corpus",
    )
    from luban.core.artifact import as_parent
    from luban.core.log import say
    from luban.corpus.quality.ngram import NgramModel
    from luban.corpus.reader import read_corpus

    model = NgramModel.train(document.text for document in read_corpus(args.corpus))
    model.save(args.out, (as_parent("corpus", args.corpus),))
    say(f"n-gram model {args.out}: {len(model.grams[-1].keys)} 3-grams of {model.vocabulary - 1} words")


def classifier(argv: Sequence[str]) -> None:
    """`luban corpus classifier GOOD OTHER --out DIR`"""
    args = parse(
        ClassifierArgs,
        argv,
        verb="corpus classifier",
        about="Learn to tell good text from any text.",
        examples="luban corpus classifier wikipedia web --out models/quality\n"
        "luban corpus build web/ --steps classifier=models/quality@0.5 --out corpus",
    )
    from luban.core.artifact import as_parent
    from luban.core.log import say
    from luban.corpus.quality.linear import LinearModel
    from luban.corpus.reader import read_corpus

    kinds = [(document.text for document in read_corpus(path)) for path in (args.good, args.other)]
    parents = (as_parent("good", args.good), as_parent("other", args.other))
    model = LinearModel.train(*kinds, seed=args.seed)
    model.save(args.out, parents, args.seed)
    rows = [
        (name, [model.score(d.text) >= 0.5 for d in read_corpus(path, "heldout")])
        for name, path in (("good", args.good), ("other", args.other))
    ]
    for name, judged in rows:
        say(f"  of {len(judged)} held-out {name} texts {sum(judged)} are judged good")
    say(f"text classifier {args.out}")
