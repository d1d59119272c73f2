"""`luban generate MODEL PROMPT`: continue a prompt, streaming to standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from luban.core.arguments import parse

EXAMPLES = """
luban generate runs/demo/base "def add(a, b):"
luban generate runs/a "Once" --max-tokens 64 --temperature 0
echo "a long prompt" | luban generate runs/a -
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    model: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")
    ]  # a run, a checkpoint, a Hugging Face directory, a GGUF file, or smollm2
    prompt: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")
    ]  # the text to continue, or the source of an encoder–decoder; - reads it from standard input
    max_tokens: int = 128  # tokens generated at most
    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 1.0  # keep the likeliest tokens with this much probability
    top_k: int = 0  # keep this many likeliest tokens; 0: all
    min_p: float = 0.0  # keep tokens at least this likely relative to the likeliest
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # end before this string; may be repeated
    seed: int | None = None  # of the draws; none: another each time
    device: str = "cpu"  # such as cpu or cuda
    dtype: str = "float32"  # precision of the weights: float32, bfloat16, float16, int8 (CPU)


def run(argv: Sequence[str]) -> None:
    """Print the prompt's continuation."""
    args = parse(Arguments, argv, verb="generate", about="Continue a prompt.", examples=EXAMPLES)
    from luban.generate.sampling import Sampling
    from luban.load.model import load_model
    from luban.serve.engine import Engine

    sampling = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                        min_p=args.min_p, stop=args.stop, seed=args.seed)  # fmt: skip
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    engine = Engine(load_model(args.model, device=args.device, dtype=args.dtype))
    for delta in engine.stream(prompt, sampling):
        print(delta.text, end="", flush=True)
    print()
