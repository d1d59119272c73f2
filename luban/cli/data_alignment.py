"""`luban data feedback|instruct|sharegpt|revise|overoptimisation`: data for alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from luban.core.arguments import parse

if TYPE_CHECKING:
    from luban.evals.backends.base import Backend


@dataclass(frozen=True)
class FeedbackArgs:
    # .jsonl: prompt, responses, scores; or prompt, response, critique, revision; or pairs
    file: tyro.conf.Positional[Path]
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
    tokenizer: Path  # a tokenizer with a chat template, a run, a Hugging Face directory, or smollm2
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
class GhostAttentionArgs:
    dialogues: tyro.conf.Positional[Path]  # .jsonl: messages (answers may be missing), or turns, a list of user turns
    model: str  # writes the answers: anything that loads, or the address of an OpenAI-compatible server
    out: Path  # directory to make
    # file of constraints that instructions are drawn from (default: four kinds that ship)
    constraints: Path | None = None
    most: int = 2  # constraints that an instruction joins, at most
    short: float = 0.5  # fraction of the training dialogues whose instruction has the short form
    # where training dialogues have the instruction: first user turn, or system
    place: Literal["user", "system"] = "user"
    every_turn: bool = False  # a training dialogue for every turn, not for the last one alone
    rewrite: bool = False  # earlier answers are written by the model too, where the dialogue has some
    max_tokens: int = 256  # of an answer
    temperature: float = 1.0  # of answers
    seed: int = 0  # of instructions and answers
    device: str = "auto"  # cpu, cuda, or auto
    model_name: str = ""  # the model's name at its address
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key for a server


@dataclass(frozen=True)
class InstructArgs:
    seeds: tyro.conf.Positional[Path]  # .jsonl of seed tasks: instruction, instances (input, output), is_classification
    model: str  # what writes them: anything that loads, or the address of an OpenAI-compatible server
    out: Path  # directory to make
    # whole tasks at once, or instruction, kind and instance in turn
    method: Literal["alpaca", "self_instruct"] = "alpaca"
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
        "luban data feedback critiques.jsonl --use revised --out revised.jsonl\n"
        "luban data feedback alpaca_eval.jsonl.gz --use pairs --out pairs.jsonl    # instruction, output_1, output_2, preference",
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
        examples="luban data sharegpt sharegpt.json --tokenizer runs/base --tokens 2048 --out chats.jsonl\n"
        "luban data sharegpt sharegpt.json --tokenizer smollm2 --out chats.jsonl",
    )
    from luban.align.sharegpt import convert_sharegpt
    from luban.core.errors import UsageError
    from luban.core.log import print_result
    from luban.load.tokenizer import load_tokenizer

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
    from luban.align.constitutional import RevisionConfig, revise
    from luban.core.log import print_result
    from luban.evals.checklist import read_principles

    config = RevisionConfig(
        rounds=args.rounds, max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed
    )
    backend = _backend(args)
    for name, value in revise(args.prompts, backend, read_principles(args.principles), args.out, config).items():
        print(f"{name:<20} {value}")
    print_result(args.out / "revisions.jsonl")


def ghost_attention(argv: Sequence[str]) -> None:
    """`luban data ghost_attention DIALOGUES --model MODEL --out DIR`"""
    args = parse(
        GhostAttentionArgs,
        argv,
        verb="data ghost_attention",
        about="Ghost Attention (Llama 2): dialogues that teach a model to keep an instruction given at their start. The model that writes "
        "answers reads the instruction in every user turn, the training dialogue has it in the first turn only, and its earlier answers "
        "have weight 0, so that luban sft trains on the last one alone. DIR/dialogues.jsonl holds them. The same command resumes.",
        examples="luban data ghost_attention chats.jsonl --model runs/chat --out runs/ghost\n"
        "luban sft luban_sft_cpu --init runs/chat --data.path runs/ghost/dialogues.jsonl --out runs/kept\n"
        "luban data ghost_attention questions.jsonl --model http://127.0.0.1:8000/v1 --place system --every-turn --out runs/ghost",
    )
    from luban.align.ghost_attention import FILE, GhostConfig, ghost_attention, read_constraints
    from luban.core.log import print_result

    same = ("most", "short", "place", "every_turn", "rewrite", "max_tokens", "temperature", "seed")
    config = GhostConfig(**{name: getattr(args, name) for name in same})
    backend = _backend(args)
    for name, value in ghost_attention(
        args.dialogues, backend, read_constraints(args.constraints), args.out, config
    ).items():
        print(f"{name:<20} {value}")
    print_result(args.out / FILE)


def _backend(args: ReviseArgs | GhostAttentionArgs | InstructArgs) -> Backend:
    """The model that writes."""
    import os

    from luban.evals.run import EvalOptions, open_backend

    key = os.environ.get(args.api_key_env, "")
    return open_backend(args.model, EvalOptions(device=args.device, model_name=args.model_name, api_key=key))[0]


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
        print(f"{name:<14} alpha {fit.alpha:.4f}  beta {fit.beta:.4f}  R² {fit.r_squared:.4f}  {fit.peak_words}")
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
    from luban.align.instruct.run import InstructConfig, generate_instructions
    from luban.core.log import print_result

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
    backend = _backend(args)
    for name, value in generate_instructions(backend, args.seeds, args.out, config).items():
        print(f"{name:<20} {value}")
    print_result(args.out / "instructions.jsonl")
