"""`luban data pack|feedback|instruct|overoptimisation|show`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

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
    tokenizer: Path  # a tokenizer, a run, or a Hugging Face directory
    out: Path  # directory to make
    verify: bool = False  # read and hash the corpus's files first, and compare with what was written


@dataclass(frozen=True)
class ShowArgs:
    shards: tyro.conf.Positional[Path]  # shards, from luban data pack or in the RUN.data of a fine-tuning
    limit: int = 10  # documents to show (0: all)
    split: Literal["train", "heldout"] = "train"  # which part
    json: bool = False  # a JSON line a document, [{"text": …, "trained": …}, …], in full


@dataclass(frozen=True)
class FeedbackArgs:
    file: tyro.conf.Positional[
        Path
    ]  # .jsonl: prompt, responses, scores; or prompt, response, critique, revision; or pairs
    out: Path  # .jsonl file to write
    # what it is for: sft on preferred, revised, conditioned or critic; reward and dpo on pairs, rankings or unpaired
    use: Literal["preferred", "revised", "pairs", "rankings", "unpaired", "conditioned", "critic"] = "pairs"


@dataclass(frozen=True)
class OveroptimisationArgs:
    file: tyro.conf.Positional[Path]  # .jsonl: prompt, proxy, gold, a row an answer of the initial policy
    out: Path = Path("overoptimisation.html")  # the page


@dataclass(frozen=True)
class ShareGPTArgs:
    file: tyro.conf.Positional[Path]  # .json or .jsonl: id, conversations (from, value)
    tokenizer: Path  # a tokenizer with a chat template, a run, or a Hugging Face directory
    out: Path  # .jsonl file to write
    tokens: int = 2048  # of a piece at most, template included


@dataclass(frozen=True)
class ReviseArgs:
    prompts: tyro.conf.Positional[Path]  # .jsonl: prompt, question or messages a row
    model: str  # answers, criticises and revises: anything that loads, or the address of an OpenAI-compatible server
    out: Path  # directory to make
    principles: Path | None = None  # file of principles with critique and revision (default: six that ship)
    rounds: int = 2  # critiques and revisions of each answer
    max_tokens: int = 256  # of each text
    temperature: float = 1.0  # of each text
    seed: int = 0  # of principles and samples
    device: str = "auto"  # cpu, cuda, or auto
    model_name: str = ""  # the model's name at its address
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key for a server


@dataclass(frozen=True)
class InstructArgs:
    seeds: tyro.conf.Positional[Path]  # .jsonl of seed tasks: instruction, instances (input, output), is_classification
    model: str  # what writes them: anything that loads, or the address of an OpenAI-compatible server
    out: Path  # directory to make
    method: Literal["alpaca", "self_instruct"] = (
        "alpaca"  # whole tasks at once, or instruction, kind and instance in turn
    )
    count: int = 100  # tasks wanted
    calls: int = 0  # rounds of requests at most (0: until there are enough)
    per_call: int = 20  # tasks of a list, its 3 demonstrations among them (alpaca)
    parallel: int = 8  # lists asked for at once
    max_tokens: int = 1024  # of an answer
    temperature: float = 1.0  # of lists of tasks
    text: bool = False  # prompts as plain text for a base model to continue, not as a chat's message
    seed: int = 0  # of demonstrations and samples
    price_in: float = 0.0  # for a million tokens read
    price_out: float = 0.0  # for a million tokens written
    device: str = "auto"  # cpu, cuda, or auto
    model_name: str = ""  # the model's name at its address
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key for a server


def run(argv: Sequence[str]) -> int | None:
    """`luban data …`"""
    return dispatch(
        "data",
        {
            "pack": (pack, "a corpus → shards of tokens"),
            "feedback": (feedback, "scores, rankings and critiques → data for sft, reward and dpo"),
            "instruct": (instruct, "instructions and answers written by a model: Alpaca, Self-Instruct"),
            "sharegpt": (sharegpt, "ShareGPT's conversations, cleaned and cut at the borders of turns"),
            "revise": (revise, "answers criticised and revised by a model over principles"),
            "overoptimisation": (overoptimisation, "gold reward against distance, fitted by Gao's forms"),
            "show": (show, "documents of shards, and what of them is trained on"),
        },
        argv,
    )


def feedback(argv: Sequence[str]) -> None:
    """`luban data feedback FILE --use USE --out FILE`"""
    args = parse(
        FeedbackArgs,
        argv,
        verb="data feedback",
        about="Turn feedback into data for one of its uses.",
        examples="luban data feedback scored.jsonl --use pairs --out pairs.jsonl\n"
        "luban data feedback scored.jsonl --use preferred --out best.jsonl     # luban sft\n"
        "luban data feedback scored.jsonl --use conditioned --out rated.jsonl  # luban sft, the score asked for in the prompt\n"
        "luban data feedback critiques.jsonl --use revised --out revised.jsonl",
    )
    from luban.align.feedback import convert
    from luban.core.log import print_result, say

    say(f"{convert(args.file, args.out, args.use)} rows")
    print_result(args.out)


def sharegpt(argv: Sequence[str]) -> None:
    """`luban data sharegpt FILE --tokenizer DIR --out FILE`"""
    args = parse(
        ShareGPTArgs,
        argv,
        verb="data sharegpt",
        about="Conversations as ShareGPT has them → data for luban sft, which trains the assistant's turns alone (Vicuna): HTML becomes "
        "text, turns must alternate, long conversations are cut between exchanges, never inside one.",
        examples="luban data sharegpt sharegpt.json --tokenizer runs/base --tokens 2048 --out chats.jsonl",
    )
    from luban.align.sharegpt import convert_sharegpt
    from luban.core.errors import UsageError
    from luban.core.log import print_result
    from luban.tokenizer.tokenizer import load_tokenizer

    if args.tokens < 1:
        raise UsageError(f"--tokens must be at least 1, {args.tokens} given")
    for name, count in convert_sharegpt(args.file, load_tokenizer(args.tokenizer), args.tokens, args.out).items():
        print(f"{name:<34} {count}")
    print_result(args.out)


def revise(argv: Sequence[str]) -> None:
    """`luban data revise PROMPTS --model MODEL --out DIR`"""
    args = parse(
        ReviseArgs,
        argv,
        verb="data revise",
        about="Constitutional AI's supervised stage: a model answers, criticises its answer by a principle that is drawn, and revises "
        "it, for some rounds. DIR/revisions.jsonl holds prompt, response, critique, revision. The same command resumes.",
        examples="luban data revise prompts.jsonl --model runs/chat --rounds 2 --out runs/revisions\n"
        "luban data feedback runs/revisions/revisions.jsonl --use revised --out revised.jsonl  # luban sft",
    )
    import os

    from luban.align.constitutional import RevisionConfig, revise
    from luban.core.log import print_result
    from luban.evals.checklist import read_principles
    from luban.evals.run import EvalOptions, open_backend

    config = RevisionConfig(
        rounds=args.rounds, max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed
    )
    key = os.environ.get(args.api_key_env, "")
    backend, _ = open_backend(args.model, EvalOptions(device=args.device, model_name=args.model_name, api_key=key))
    for name, value in revise(args.prompts, backend, read_principles(args.principles), args.out, config).items():
        print(f"{name:<20} {value}")
    print_result(args.out / "revisions.jsonl")


def overoptimisation(argv: Sequence[str]) -> None:
    """`luban data overoptimisation FILE --out PAGE`"""
    args = parse(
        OveroptimisationArgs,
        argv,
        verb="data overoptimisation",
        about="How far a proxy reward can be optimised before the gold reward falls (Gao et al. 2023): best-of-n by the unbiased "
        "estimator and the policies that a KL penalty tends to, from answers of the initial policy scored by both rewards (luban "
        "score, twice). Prints alpha, beta, R² and the distance of the peak, and draws both curves.",
        examples="luban data overoptimisation scored.jsonl --out overoptimisation.html",
    )
    from luban.align.overoptimisation import overoptimisation_report
    from luban.core.log import print_result

    for name, fit in overoptimisation_report(args.file, args.out).items():
        print(
            f"{name:<14} alpha {fit.alpha:.4f}  beta {fit.beta:.4f}  R² {fit.r_squared:.4f}  peak at √KL {fit.peak:.2f}"
        )
    print_result(args.out)


def instruct(argv: Sequence[str]) -> None:
    """`luban data instruct SEEDS --model MODEL --out DIR`"""
    args = parse(
        InstructArgs,
        argv,
        verb="data instruct",
        about="Instruction data written by a model from seed tasks (Self-Instruct, Alpaca). A new instruction whose ROUGE-L with one "
        "that is there reaches 0.7 is dropped; what is dropped, tokens and cost are counted. DIR/instructions.jsonl is data for "
        "luban sft. The same command resumes.",
        examples="luban data instruct seed_tasks.jsonl --model runs/chat --count 1000 --out runs/instructions\n"
        "luban data instruct seeds.jsonl --model http://127.0.0.1:8000/v1 --method self_instruct --out runs/instructions",
    )
    import os

    from luban.align.instruct.run import InstructConfig, generate_instructions
    from luban.core.log import print_result
    from luban.evals.run import EvalOptions, open_backend

    same = (
        "method",
        "count",
        "calls",
        "per_call",
        "parallel",
        "max_tokens",
        "temperature",
        "seed",
        "price_in",
        "price_out",
    )
    config = InstructConfig(chat=not args.text, **{name: getattr(args, name) for name in same})
    key = os.environ.get(args.api_key_env, "")
    backend, _ = open_backend(args.model, EvalOptions(device=args.device, model_name=args.model_name, api_key=key))
    for name, value in generate_instructions(backend, args.seeds, args.out, config).items():
        print(f"{name:<20} {value}")
    print_result(args.out / "instructions.jsonl")


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

    if not args.corpora:
        raise UsageError("name at least one corpus to pack (see luban data pack --help)")
    held = [open_artifact(path, "corpus", verify=args.verify).figures for path in args.corpora]
    figures = pack_shards(
        read_corpora(args.corpora),
        args.tokenizer,
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
        "luban data show runs/chat.data/shards-0123456789ab --limit 20 --json > masks.jsonl",
    )
    from rich.console import Console

    from luban.core.errors import UsageError
    from luban.data.shards import Shards
    from luban.data.show import coloured, document_spans, document_tokens
    from luban.tokenizer.tokenizer import load_tokenizer

    if args.limit < 0:
        raise UsageError(f"--limit must be at least 0, {args.limit} given")
    shards = Shards.open(args.shards, args.split)
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
