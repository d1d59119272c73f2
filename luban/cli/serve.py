"""`luban serve MODEL`: the OpenAI-compatible API and the chat page."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from luban.core.arguments import parse, refuse_flags
from luban.core.environment import flags_from_environment
from luban.core.plan import ParallelPlan

if TYPE_CHECKING:
    from luban.load.model import LoadedModel
    from luban.retrieval.answering import PassageRetriever
    from luban.serve.api.app import ServerOptions

EXAMPLES = """
luban serve runs/demo/chat
luban serve runs/a --port 9000 --api-key "$KEY"
luban serve smollm2 --adapter runs/lora
luban serve smollm2 --adapter sql=runs/sql --adapter poems=runs/poems   # requests ask for one as "model"
luban serve smollm2 --runtime-adapters --api-key "$KEY"   # adapters come and go: POST /v1/load_lora_adapter
luban serve smollm2 --index index   # answers with `citations`, from the passages of luban rag index
luban serve smollm2 --index index --sentences 1 --quote   # a small model answers in a passage's own words
luban serve runs/answers --index index   # a model of luban rag train: its passages are summed out
luban serve runs/a --device cuda --dtype bfloat16 --replicas 4   # one address, a GPU each
luban serve runs/large --device cuda --dtype bfloat16 --plan.tensor 2   # one model over two GPUs
luban serve smollm2 --cors https://chat.example.org --allowed-host models.example.org
LUBAN_SERVE_PORT=9000 LUBAN_SERVE_MAX_QUEUE=64 luban serve smollm2 --dtype int8 --log-requests
curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"messages": [{"role": "user", "content": "Hello"}]}'
"""
KEY_VARIABLE = "LUBAN_API_KEY"
PREFIX = "LUBAN_SERVE"
FRONT = ("replicas", "host", "port", "api_key", "allowed_host", "cors", "requests_per_minute")  # not of each replica


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """Among how many processes a model is divided."""

    tensor: int = 1  # processes that divide the model's matrices and its cache, each on a GPU of its own

    def checked(self) -> ParallelPlan:
        """As the engine takes it. Raises ConfigError for a number below 1."""
        return ParallelPlan(tensor=self.tensor)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    # a run, a checkpoint, a Hugging Face directory, a GGUF file, or smollm2
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    # a run of adapters or a PEFT directory, over MODEL; NAME=DIR, repeatable: requests ask for it by their "model"
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    max_adapters: int = 16  # adapters with names that are in memory at once
    # take adapters while it runs, by POST /v1/load_lora_adapter, and let them go by /v1/unload_lora_adapter; whoever has the key
    # can have any folder of this machine read as one
    runtime_adapters: bool = False
    index: str | None = None  # from luban rag index: chats are answered from its passages, with citations
    # of the index before a question at most; none: 5, or as in training for one of rag train
    passages: int | None = None
    rerank: str | None = None  # a cross-encoder that puts the index's best passages in order, from luban rag train
    # of the passages together that the model reads, the best by BM25; none: whole passages
    sentences: int | None = None
    quote: bool = False  # answers are words of a passage as they stand there, by a grammar
    host: str = "127.0.0.1"  # address to listen at
    replicas: int = 1  # copies of the server behind one address, each on a GPU of its own (or a share of the cores)
    plan: ServingPlan = field(default_factory=ServingPlan)
    port: int = 8000  # the next free one is taken where it is in use; 0: any
    api_key: str | None = None  # clients must send it; none: LUBAN_API_KEY from the environment
    allowed_host: tuple[str, ...] = ()  # names of this server, besides addresses, localhost and the machine's own
    cors: tuple[str, ...] = ()  # sites whose pages may use this server, such as https://chat.example.org
    draft: str | None = None  # a smaller model with the same vocabulary that guesses tokens; texts don't change
    speculative: Literal["none", "ngram"] = "none"  # ngram: guess tokens from what followed the same ones before
    draft_tokens: int = 4  # guessed at once
    device: str = "cpu"  # such as cpu or cuda
    dtype: str = "float32"  # precision of the weights: float32, bfloat16, float16, int8, fp8 (GPU)
    max_batch: int | None = None  # sequences that run together; none: 256, with a contiguous cache 32
    cache_gb: float | None = None  # memory for keys and values, GB; none: as much as is free, on a CPU half of it
    cache_dtype: Literal["auto", "fp8"] = "auto"  # of keys and values: fp8 takes about half of the memory, at some loss
    # where memory is short: read tokens again, or keep them on the host
    preemption: Literal["recompute", "swap"] = "recompute"
    swap_gb: float = 4.0  # host memory of --preemption swap, GB
    batch_invariant: bool = False  # bit for bit the same answer whatever shares the batch; slower
    # of conversations longer than the context: refuse them, leave out the oldest turns (drop), or those that the last message
    # isn't about (retrieve); the header luban-messages-left-out says how many messages
    history: Literal["error", "drop", "retrieve"] = "error"
    max_queue: int = 1024  # sequences that may wait; requests beyond are answered 429
    requests_per_minute: int | None = None  # of one client, by its key or address; more are answered 429
    drain_seconds: float = 30.0  # that answers may go on for after SIGTERM
    log_requests: bool = False  # a line of JSON on standard error for every request, without its text
    log_text: bool = False  # with --log-requests, the text of prompts and answers too


def words_of(args: Arguments, without: Sequence[str]) -> list[str]:
    """A command line that gives these arguments, but for those named."""
    words = [args.model]
    if args.plan != ServingPlan():
        words += ["--plan.tensor", str(args.plan.tensor)]
    for each in fields(args):
        value, flag = getattr(args, each.name), f"--{each.name.replace('_', '-')}"
        if each.name in ("model", "plan", *without) or value == each.default:
            continue
        if isinstance(value, bool):
            words.append(flag)
        else:
            words += [word for one in (value if isinstance(value, tuple) else (value,)) for word in (flag, str(one))]
    return words


def _refuse_unused(args: Arguments, argv: Sequence[str]) -> None:
    """Raise UsageError for flags that would do nothing, or not what they say."""
    from luban.core.errors import UsageError
    from luban.serve.adapter_names import by_name

    alone, named = by_name(args.adapter)
    if not named and not args.runtime_adapters:
        refuse_flags(argv, ("max_adapters",), "without --adapter NAME=DIR or --runtime-adapters")
    if args.runtime_adapters and alone:
        raise UsageError(f"--runtime-adapters takes adapters with names: give --adapter NAME={alone}")
    if args.runtime_adapters and args.replicas > 1:
        raise UsageError(
            "--runtime-adapters is for one server, since a request reaches one of --replicas: leave one of them out"
        )
    if args.index is None:
        refuse_flags(argv, ("passages", "rerank", "sentences", "quote"), "without --index")
    if not args.draft and args.speculative == "none":
        refuse_flags(argv, ("draft_tokens",), "without --draft or --speculative")
    if args.preemption != "swap":
        refuse_flags(argv, ("swap_gb",), "without --preemption swap")
    if not args.log_requests:
        refuse_flags(argv, ("log_text",), "without --log-requests")


def run(argv: Sequence[str]) -> None:
    """Serve until interrupted."""
    argv = flags_from_environment(Arguments, argv, PREFIX, os.environ, positional=("model",))
    about = "An OpenAI-compatible API and a chat page. Every flag may be set by a variable: LUBAN_SERVE_PORT=9000."
    args = parse(Arguments, argv, verb="serve", about=about, examples=EXAMPLES)
    from luban.core.errors import MissingExtra, UsageError

    checks = (
        (0 <= args.port < 1 << 16, "--port must be from 0 (any) to 65535", args.port),
        (args.replicas >= 1, "--replicas must be at least 1", args.replicas),
        (args.max_queue >= 0, "--max-queue must be 0 or more", args.max_queue),
        (args.max_batch is None or args.max_batch >= 1, "--max-batch must be at least 1", args.max_batch),
        (args.cache_gb is None or args.cache_gb > 0, "--cache-gb must be larger than 0", args.cache_gb),
        (
            args.requests_per_minute is None or args.requests_per_minute >= 1,
            "--requests-per-minute must be at least 1",
            args.requests_per_minute,
        ),
        (args.passages is None or args.passages >= 1, "--passages must be at least 1", args.passages),
        (args.sentences is None or args.sentences >= 1, "--sentences must be at least 1", args.sentences),
        (args.max_adapters >= 1, "--max-adapters must be at least 1", args.max_adapters),
        (args.swap_gb > 0, "--swap-gb must be larger than 0", args.swap_gb),
        (args.draft_tokens >= 1, "--draft-tokens must be at least 1", args.draft_tokens),
        (args.drain_seconds >= 0, "--drain-seconds must be 0 or more", args.drain_seconds),
    )
    for fine, right, given in checks:
        if not fine:
            raise UsageError(f"{right}, {given} given")
    if args.draft and args.speculative != "none":
        raise UsageError("--draft and --speculative both guess tokens: use one")
    _refuse_unused(args, argv)
    plan = args.plan.checked()
    from luban.load.model import load_model
    from luban.serve.adapter_names import by_name
    from luban.serve.engine import Engine
    from luban.serve.run import serve

    alone, named = by_name(args.adapter)

    try:
        from luban.serve.api.app import ServerOptions
    except ImportError as error:
        raise MissingExtra(error.name or "fastapi", "serve", "luban serve") from None

    options = ServerOptions(
        api_key=args.api_key or os.environ.get(KEY_VARIABLE),
        hosts=args.allowed_host,
        origins=args.cors,
        max_queue=args.max_queue,
        requests_per_minute=args.requests_per_minute,
        log_requests=args.log_requests,
        log_text=args.log_text,
        history=args.history,
        more_adapters=args.runtime_adapters,
    )
    if args.replicas > 1:
        from luban.serve.replicas.run import serve_replicas

        words, place = ["serve", *words_of(args, FRONT)], {"host": args.host, "port": args.port}
        each = plan.tensor
        return serve_replicas(
            words, args.replicas, name=args.model, device=args.device, gpus=each, options=options, **place
        )

    from luban.retrieval.rag.model import is_rag

    # a model that is divided need not fit one device
    loaded_on = "cpu" if plan.tensor > 1 else args.device
    if is_rag(args.model):
        if plan.tensor > 1:
            raise UsageError("--plan.tensor: a model of rag train answers on one device")
        load, options = _summed_out(args, options)
    else:
        options = replace(options, retriever=_retriever(args))

        def load() -> LoadedModel:
            return load_model(args.model, device=loaded_on, dtype=args.dtype, adapter=alone)

    def engine(model: LoadedModel) -> Engine:
        return Engine(
            model,
            max_batch=args.max_batch,
            cache_bytes=None if args.cache_gb is None else int(args.cache_gb * 1e9),
            cache_dtype=args.cache_dtype,
            draft=load_model(args.draft, device=args.device, dtype=args.dtype) if args.draft else None,
            ngram=args.speculative == "ngram",
            draft_tokens=args.draft_tokens,
            swap_bytes=int(args.swap_gb * 1e9) if args.preemption == "swap" else 0,
            batch_invariant=args.batch_invariant,
            adapters=named,
            max_adapters=args.max_adapters,
            more_adapters=args.runtime_adapters,
            plan=plan,
            device=args.device,
        )

    serve(
        load,
        name=args.model,
        host=args.host,
        port=args.port,
        options=options,
        engine=engine,
        drain_seconds=args.drain_seconds,
    )


def _retriever(args: Arguments) -> PassageRetriever | None:
    """What finds passages for a model that reads them before the question."""
    if args.index is None:
        return None
    from luban.retrieval.answering import DEFAULT_K, PassageRetriever
    from luban.retrieval.index import Index
    from luban.retrieval.reranking import reranked

    index = Index(args.index, device=args.device)
    searched = reranked(index, args.rerank, args.device) or index
    retriever = PassageRetriever(searched, args.passages or DEFAULT_K, args.sentences, quote=args.quote)
    retriever.warm()
    return retriever


def _summed_out(args: Arguments, options: ServerOptions) -> tuple[Callable[[], LoadedModel], ServerOptions]:
    """A model of `luban rag train`: what gives its generator, and the options with what answers chats.

    Raises UsageError for what it can't be served with, LineageError for an index of another encoder.
    """
    from luban.core.errors import UsageError
    from luban.retrieval.index import Index
    from luban.retrieval.rag.asking import RagAsker
    from luban.retrieval.rag.model import GENERATOR, load_rag

    if args.index is None:
        raise UsageError(
            f"{args.model} finds the passages of its answers in an index: name one by --index, or serve "
            f"{args.model}/{GENERATOR}, which answers without"
        )
    for name in ("adapter", "runtime_adapters", "rerank", "sentences", "quote"):
        if getattr(args, name):
            raise UsageError(
                f"--{name.replace('_', '-')}: a model of rag train answers with its own generator, which reads whole passages and weighs them"
            )
    rag = load_rag(args.model, args.device, args.dtype)
    asker = RagAsker(Index(args.index, device=args.device), rag, args.passages)
    model = replace(rag.generator.model, name=Path(args.model).resolve().name)
    return lambda: model, replace(options, answerer=asker)
