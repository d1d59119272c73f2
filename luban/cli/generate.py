"""`luban generate MODEL PROMPT`: continue a prompt, streaming to standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from luban.cli.serve import ServingPlan
from luban.core.arguments import parse, refuse_flags
from luban.core.errors import UsageError

if TYPE_CHECKING:
    from luban.generate.sampling import Sampling
    from luban.generate.structure import Structure
    from luban.load.model import LoadedModel

REWARD_SECONDS = 10.0  # that a reward function has for one answer

EXAMPLES = """
luban generate runs/demo/base "def add(a, b):"
luban generate runs/a "Once" --max-tokens 64 --temperature 0
echo "a long prompt" | luban generate runs/a -
luban generate smollm2 "A city as JSON: " --json-schema city.json
luban generate smollm2 "The capital of France is" --beams 4 --n 2
luban generate runs/large "Once" --draft runs/small
luban generate runs/large "Once" --device cuda --dtype bfloat16 --plan.tensor 2   # one model over two GPUs
luban generate runs/chat "What is a list?" --best-of 16 --reward runs/rm
luban generate runs/chat prompts.jsonl --best-of 16 --reward runs/rm --out best.jsonl   # for luban sft: rejection sampling
luban generate smollm2 "Is Paris in France? " --choice yes --choice no
luban generate smollm2 "Once" --adapter runs/lora
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    # a run, a checkpoint, a Hugging Face directory, a GGUF file, or smollm2
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    # the text to continue, or the source of an encoder–decoder; - reads it from standard input
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    max_tokens: int | None = None  # tokens generated at most; none: as generation_config.json sets it, or 128
    temperature: float | None = None  # 0: always the likeliest token; none: as generation_config.json sets it, or 0.8
    # keep the likeliest tokens with this much probability; none: as generation_config.json sets it, or 1
    top_p: float | None = None
    top_k: int | None = None  # keep this many likeliest tokens, 0: all; none: as generation_config.json sets it, or 0
    min_p: float | None = None  # keep tokens at least this likely relative to the likeliest; none: as set, or 0
    repetition_penalty: float | None = None  # above 1 tokens repeat less; none: as generation_config.json sets it, or 1
    beams: int = 1  # above 1: beam search of this width, in which nothing is drawn
    length_penalty: float = 1.0  # of beam search: sums of log-probabilities are divided by length ** this
    n: int = 1  # texts, one below the other
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # end before this string; may be repeated
    json_schema: Path | None = None  # the text is JSON that the schema in this file allows
    regex: str | None = None  # the text matches this expression
    choice: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # the text is one of these; may be repeated
    grammar: Path | None = None  # the text is derived by the grammar in this file, in Lark's notation
    seed: int | None = None  # of the draws; none: another each time
    draft: str | None = None  # a smaller model with the same vocabulary that guesses tokens; texts don't change
    speculative: Literal["none", "ngram"] = "none"  # ngram: guess tokens from what followed the same ones before
    draft_tokens: int = 4  # guessed at once
    adapter: str | None = None  # a run of adapters or a PEFT directory, over MODEL
    best_of: int = 1  # answer the prompt, as a user's message, so often and print the answer that --reward likes best
    reward: str = ""  # of --best-of: a run of luban reward, file.py:function, facts, regex:PATTERN or an http address
    # of --best-of: PROMPT is a .jsonl file of prompts, whose best answers are written here as conversations
    out: Path | None = None
    pairs: bool = False  # with --out: write best and worst as pairs for luban dpo
    plan: ServingPlan = field(default_factory=ServingPlan)
    device: str = "cpu"  # such as cpu or cuda
    dtype: str = "float32"  # precision of the weights: float32, bfloat16, float16, int8, fp8 (GPU)
    cache_dtype: Literal["auto", "fp8"] = "auto"  # of keys and values: fp8 takes about half of the memory, at some loss


def structure_of(args: Arguments) -> Structure | None:
    """What the text must be; None: anything. Raises UsageError for two at once and for files that can't be read."""
    from luban.generate.structure import Structure

    def read(path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} can't be read: {error}") from None

    given = {name: value for name in ("json_schema", "regex", "choice", "grammar") if (value := getattr(args, name))}
    if len(given) > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{flags} both say what the text must be: use one")
    for name, value in given.items():
        return getattr(Structure, name)(read(value) if isinstance(value, Path) else value)
    return None


def run(argv: Sequence[str]) -> None:
    """Print the prompt's continuation."""
    args = parse(Arguments, argv, verb="generate", about="Continue a prompt.", examples=EXAMPLES)
    from luban.load.generation import Generation
    from luban.load.model import load_model
    from luban.serve.engine import Engine

    names = (
        "beams",
        "length_penalty",
        "n",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "seed",
    )
    asked = {name: getattr(args, name) for name in names} | {"stop": args.stop or None, "structure": structure_of(args)}
    if (args.best_of > 1) != bool(args.reward):
        raise UsageError("--best-of N and --reward go together: give both or none")
    if not args.reward:
        refuse_flags(argv, ("out",), "without --best-of N and --reward")
    if args.out is None:
        refuse_flags(argv, ("pairs",), "without --out FILE.jsonl")
    plan = args.plan.checked()
    unused = [flag for flag in ("n", "beams", "draft", "speculative") if getattr(args, flag) not in (1, None, "none")]
    if args.reward and unused:
        raise UsageError(f"--best-of samples its answers without --{unused[0]}: leave it out")
    if args.reward and plan.tensor > 1:
        raise UsageError("--best-of samples its answers in one process: leave --plan.tensor out")
    if args.draft and args.speculative != "none":
        raise UsageError("--draft and --speculative both guess tokens: use one")
    if not args.draft and args.speculative == "none":
        refuse_flags(argv, ("draft_tokens",), "without --draft or --speculative")
    if args.beams == 1:
        refuse_flags(argv, ("length_penalty",), "without --beams")
    Generation().sample(asked)  # what can't be is said before the model is read
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    loaded_on = "cpu" if plan.tensor > 1 else args.device
    model = load_model(args.model, device=loaded_on, dtype=args.dtype, adapter=args.adapter)
    if args.reward:
        sampling = model.generation.sample({**asked, "n": args.best_of}, max_tokens=128, temperature=0.8)
        print(_best(args, model, sampling, prompt))
        return
    engine = Engine(
        model,
        draft=load_model(args.draft, device=args.device, dtype=args.dtype) if args.draft else None,
        ngram=args.speculative == "ngram",
        draft_tokens=args.draft_tokens,
        cache_dtype=args.cache_dtype,
        plan=plan,
        device=args.device,
    )
    sampling = model.generation.sample(asked, max_tokens=128, temperature=0.8)
    if args.n > 1:
        for choice in engine.generate(prompt, sampling)[0].choices:
            print(choice.text, flush=True)
    else:
        for delta in engine.stream(prompt, sampling):
            print(delta.text, end="", flush=True)
        print()
    engine.close()


def _best(args: Arguments, model: LoadedModel, sampling: Sampling, prompt: str) -> str:
    """The best of several answers to the prompt; with `out` the file of the best answers to the prompts of a file."""
    from luban.align.best_of import best_of, rejection_sample
    from luban.align.rewards.base import open_rewards
    from luban.core.jsonl import read_rows
    from luban.core.log import say
    from luban.serve.engine import Engine

    rewards = open_rewards([args.reward], (), model.need_tokenizer(), args.model, args.device, REWARD_SECONDS)
    if args.out is None:
        return best_of(Engine(model), model, {"prompt": prompt}, sampling, rewards)[0].text
    figures = rejection_sample(
        model,
        [row for _, row in read_rows(Path(args.prompt))],
        rewards,
        args.out,
        sampling,
        pairs=args.pairs,
    )
    say(
        f"{figures['prompts']} prompts; mean score {figures['mean_score']:.3g}, of the best of {args.best_of} "
        f"{figures['best_score']:.3g}"
    )
    return str(args.out)
