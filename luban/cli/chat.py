"""`luban chat MODEL`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from luban.core.arguments import parse
from luban.core.errors import LubanError
from luban.core.log import say

EXAMPLES = """
luban chat runs/demo/chat
luban chat runs/a --temperature 0 --system "You answer in one line."
"""
COMMANDS = "/reset forgets the conversation, /quit ends it, Ctrl-C stops an answer"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    model: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")
    ]  # a run, a checkpoint or a Hugging Face directory
    system: str | None = None  # a system message before the conversation
    max_tokens: int = 256  # tokens an answer has at most
    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 1.0  # keep the likeliest tokens with this much probability
    seed: int | None = None  # of the draws; none: another each time
    device: str = "cpu"  # such as cpu or cuda
    dtype: str = "float32"  # precision of the weights: float32, bfloat16, float16, int8 (CPU)


def run(argv: Sequence[str]) -> None:
    """Talk until /quit or the end of the input."""
    args = parse(Arguments, argv, verb="chat", about="Talk to a model.", examples=EXAMPLES)
    from luban.core.errors import DataError
    from luban.generate.sampling import Sampling
    from luban.load.model import load_model
    from luban.serve.engine import Engine

    sampling = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    model = load_model(args.model, device=args.device, dtype=args.dtype)
    if model.need_tokenizer().chat_template is None:
        raise DataError(f"{args.model} has no chat template, it is a base model: use luban generate")
    engine = Engine(model)
    interactive = sys.stdin.isatty()
    if interactive:
        say(f"{model.name}: {COMMANDS}")
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    while (line := _ask(interactive)) is not None:
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            messages = list(opening)
            if interactive:
                say("the conversation is forgotten")
        elif line.startswith("/") and line.split()[0] in ("/help", "/?"):
            say(COMMANDS)
        elif line:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(engine, messages, sampling)})


def _ask(interactive: bool) -> str | None:
    """A line from the person, or None at the end of the input."""
    try:
        line = input("\n› " if interactive else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    if not interactive and not line.startswith("/"):
        say(f"› {line}")  # what a terminal would have shown
    return line


def _answer(engine, messages: list[dict[str, str]], sampling) -> str:
    """Stream the answer to standard output; what was said before an interruption counts."""
    said = []
    try:
        for delta in engine.stream(messages, sampling):
            said.append(delta.text)
            print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except LubanError as error:  # a conversation grown past the context must not end the session
        say(f"luban: {error} (/reset begins anew)")
    print(flush=True)
    return "".join(said)
