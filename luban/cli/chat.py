"""`luban chat MODEL`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from luban.core.arguments import parse, refuse_flags
from luban.core.errors import LubanError
from luban.core.log import say

if TYPE_CHECKING:
    from luban.core.protocols import Retriever
    from luban.generate.sampling import Sampling
    from luban.serve.engine import Engine
    from luban.serve.history import Rule

EXAMPLES = """
luban chat runs/demo/chat
luban chat smollm2 --dtype int8
luban chat smollm2 --adapter runs/lora
luban chat runs/a --temperature 0 --system "You answer in one line."
luban chat runs/a --history summarise
luban chat runs/tuned --tools calculator,sql:shop.db,tools.py:weather   # a model whose chat template writes calls
"""
COMMANDS = "/reset forgets the conversation, /history shows what was left out, /quit ends it, Ctrl-C stops an answer"
ENDED = {
    "length": "--max-tokens is reached",
    "calls": "no more calls are allowed (--tool-calls)",
    "seconds": "it took too long",
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    # a run, a checkpoint, a Hugging Face directory, a GGUF file, or smollm2
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    system: str | None = None  # a system message before the conversation
    max_tokens: int | None = None  # tokens an answer has at most; none: as generation_config.json sets it, or 256
    temperature: float | None = None  # 0: always the likeliest token; none: as generation_config.json sets it, or 0.7
    # keep the likeliest tokens with this much probability; none: as generation_config.json sets it, or 1
    top_p: float | None = None
    top_k: int | None = None  # keep this many likeliest tokens, 0: all; none: as generation_config.json sets it, or 0
    repetition_penalty: float | None = None  # above 1 tokens repeat less; none: as generation_config.json sets it, or 1
    seed: int | None = None  # of the draws; none: another each time
    # what goes when the context is full: the oldest turns (drop; summed up: summarise), or those that the question isn't
    # about (retrieve); error: the answer is refused
    history: Literal["drop", "summarise", "retrieve", "error"] = "drop"
    # functions that the model may call: calculator, search:INDEX, sql:DATABASE, FILE.py:FUNCTION; several by commas or repeated
    tools: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    tool_calls: int = 8  # calls that one answer may make
    tool_seconds: float = 10.0  # that a call may take
    adapter: str | None = None  # a run of adapters or a PEFT directory, over MODEL
    device: str = "cpu"  # such as cpu or cuda
    dtype: str = "float32"  # precision of the weights: float32, bfloat16, float16, int8, fp8 (GPU)


def run(argv: Sequence[str]) -> None:
    """Talk until /quit or the end of the input."""
    args = parse(Arguments, argv, verb="chat", about="Talk to a model.", examples=EXAMPLES)
    from luban.core.errors import DataError
    from luban.load.generation import Generation
    from luban.load.model import load_model
    from luban.serve.engine import Engine

    if not args.tools:
        refuse_flags(argv, ("tool_calls", "tool_seconds"), "without --tools")
    names = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    asked = {name: getattr(args, name) for name in names}
    Generation().sample(asked)  # what can't be is said before the model is read
    answering = _Answering(args)
    model = load_model(args.model, device=args.device, dtype=args.dtype, adapter=args.adapter)
    if model.need_tokenizer().chat_template is None:
        raise DataError(f"{args.model} has no chat template, it is a base model: use luban generate")
    answering.use(Engine(model), model.generation.sample(asked, max_tokens=256, temperature=0.7))
    interactive = sys.stdin.isatty()
    if interactive:
        say(f"{model.name}: {COMMANDS}")
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages: list[dict[str, Any]] = list(opening)
    while (line := _ask(interactive)) is not None:
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            messages = list(opening)
            if interactive:
                say("the conversation is forgotten")
        elif line == "/history":
            say("\n".join(answering.left_out()) or "the model reads the whole conversation")
        elif line.startswith("/") and line.split()[0] in ("/help", "/?"):
            say(COMMANDS)
        elif line:
            messages.append({"role": "user", "content": line})
            messages += answering.answer(messages)


def _index(path: str) -> Retriever:
    """The index of a tool search:INDEX."""
    from luban.retrieval.index import Index

    return Index(path)


class _Answering:
    """Answers conversations in the terminal, with tools where there are any, as far as the context goes."""

    def __init__(self, args: Arguments):
        from luban.tools.loop import ToolLimits
        from luban.tools.open import open_tools

        self.rule: Rule = args.history
        self.tools = open_tools(args.tools, _index)
        self.limits = ToolLimits(calls=args.tool_calls, call_seconds=args.tool_seconds)
        self.dropped: list[dict[str, Any]] = []

    def use(self, engine: Engine, sampling: Sampling) -> None:
        """The model that answers. Raises DataError where its template writes no calls, and tools were asked for."""
        from luban.serve.history import History
        from luban.tools.loop import conversation_tokens

        self.engine, self.sampling = engine, sampling
        count = conversation_tokens(engine, self.tools)
        self.history = History(engine, self.rule, answer_tokens=sampling.max_tokens, tokens=count)

    def left_out(self) -> list[str]:
        """What the last answer didn't read, a line a message."""
        return [f"left out: {message['role']}: {message.get('content') or ''}" for message in self.dropped]

    def answer(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Stream the answer to standard output and return its messages; what was said before an interruption counts."""
        said: list[str] = []

        def show(text: str) -> None:
            said.append(text)
            print(text, end="", flush=True)

        found: list[dict[str, Any]] = []
        try:
            fitted = self.history.fit(messages)
            self.dropped = fitted.dropped
            if fitted.note():
                say(f"[{fitted.note()}; /history shows them]")
            if self.tools:
                found = self._with_tools(fitted.messages, show)
            else:
                for delta in self.engine.stream(fitted.messages, self.sampling):
                    show(delta.text)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except LubanError as error:  # a conversation grown past the context must not end the session
            say(f"luban: {error} (/reset begins anew)")
        print(flush=True)
        return found or [{"role": "assistant", "content": "".join(said)}]

    def _with_tools(self, messages: list[dict[str, Any]], show: Callable[[str], None]) -> list[dict[str, Any]]:
        from luban.tools.loop import run_tools

        run = run_tools(
            self.engine,
            messages,
            self.tools,
            self.sampling,
            limits=self.limits,
            on_text=show,
            on_call=lambda call: say(f"[{call.name} {call.arguments} → {call.outcome.text[:200]}]"),
        )
        if run.ended != "answer":
            say(f"[the answer was ended: {ENDED[run.ended]}]")
        return run.messages


def _ask(interactive: bool) -> str | None:
    """A line from the person, or None at the end of the input."""
    try:
        line = input("\n› " if interactive else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    if not interactive and not line.startswith("/"):
        say(f"› {line}")  # what a terminal would have shown
    return line
