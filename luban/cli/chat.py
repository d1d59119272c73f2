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
luban chat smollm2 --dtype int8
luban chat smollm2 --adapter runs/lora
luban chat runs/a --temperature 0 --system "You answer in one line."
"""
COMMANDS = "/reset forgets the conversation, /quit ends it, Ctrl-C stops an answer"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    model: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")
    ]  # a run, a checkpoint, a Hugging Face directory, a GGUF file, or smollm2
    system: str | None = None  # a system message before the conversation
    max_tokens: int | None = None  # tokens an answer has at most; none: as generation_config.json sets it, or 256
    temperature: float | None = None  # 0: always the likeliest token; none: as generation_config.json sets it, or 0.7
    top_p: float | None = (
        None  # keep the likeliest tokens with this much probability; none: as generation_config.json sets it, or 1
    )
    top_k: int | None = None  # keep this many likeliest tokens, 0: all; none: as generation_config.json sets it, or 0
    repetition_penalty: float | None = None  # above 1 tokens repeat less; none: as generation_config.json sets it, or 1
    seed: int | None = None  # of the draws; none: another each time
    adapter: str | None = None  # a run of adapters or a PEFT directory, over MODEL
    device: str = "cpu"  # such as cpu or cuda
    dtype: str = "float32"  # precision of the weights: float32, bfloat16, float16, int8 (CPU)


def run(argv: Sequence[str]) -> None:
    """Talk until /quit or the end of the input."""
    args = parse(Arguments, argv, verb="chat", about="Talk to a model.", examples=EXAMPLES)
    from luban.core.errors import DataError
    from luban.load.generation import Generation
    from luban.load.model import load_model
    from luban.serve.engine import Engine

    names = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    asked = {name: getattr(args, name) for name in names}
    Generation().sample(asked)  # what can't be is said before the model is read
    model = load_model(args.model, device=args.device, dtype=args.dtype, adapter=args.adapter)
    if model.need_tokenizer().chat_template is None:
        raise DataError(f"{args.model} has no chat template, it is a base model: use luban generate")
    engine, sampling = Engine(model), model.generation.sample(asked, max_tokens=256, temperature=0.7)
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
