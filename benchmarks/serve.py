"""Speed, latency and memory of the serving engine, beside its contiguous cache and transformers' generate.

    python benchmarks/serve.py [--size tiny|small|1b] [--requests 1 8 64 256] [--engines paged contiguous transformers] [--tensor 2]

Random weights and random prompts, greedy, whole requests through `luban.Engine`, all submitted at once. For every number of
requests: output tokens a second over the whole time, prompt tokens a second, time to the first token and between tokens
(percentiles over requests and tokens), and the share of slots for keys and values that hold a token, mean over steps: of
the paged pool's blocks in use, of a contiguous cache, and of one that reserves every sequence's longest length
(prompt + max_tokens) or the whole context. `--shared N` begins all prompts with N common tokens, and the share found in the
prefix cache is told; a token in a shared block counts for every sequence that holds it, so that shares may exceed 1.
`--tensor N` divides the model of the paged engine among N devices (processes on a CPU). `in_order` is the paged engine whose
host knows every step's tokens before it submits the next. transformers pads a batch on the left and holds it to its end.
Engines take turns in one process, so that what else the machine does falls on all alike.

1b is a LLaMA shape of 1.1B parameters: 22 layers, width 2,048, 32 heads, 4 key heads, feed-forward 5,632, vocabulary
32,000, in bf16; small, for a CPU, has 6 layers of width 256 in fp32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from kernel_table import kernel_table

import luban
from luban.core.plan import ParallelPlan
from luban.generate.session import Sequence as Growing
from luban.load.model import PACKED, LoadedModel
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.int8 import pack_for_inference
from luban.nn.mixer.grouped import Grouped
from luban.serve.bench.measure import percentiles
from luban.serve.paged import PagedBatch
from luban.serve.request import Request

SIZES = {  # vocabulary, width, layers, heads, key heads, feed-forward, context
    "tiny": (512, 64, 2, 4, 2, 128, 512),
    "small": (4096, 256, 6, 8, 2, 768, 1024),
    "1b": (32_000, 2048, 22, 32, 4, 5632, 4096),
}
PAGED = ("paged", "in_order")  # engines with a paged cache
SAMPLED = 16  # steps between counts of the memory that holds tokens
Measured = dict[str, float]
Prompts = list[list[int]]


def spec_of(size: str) -> ModelSpec:
    """A LLaMA shape."""
    vocabulary, width, layers, heads, key_heads, inner, context = SIZES[size]
    return uniform(
        vocab_size=vocabulary,
        width=width,
        context=context,
        layers=layers,
        mixer=Grouped(heads=heads, kv_heads=key_heads),
        feedforward=SwiGLU(width=inner),
    )


def milliseconds(values: list[float], name: str) -> Measured:
    """Percentiles of seconds, in milliseconds."""
    return {f"{name}_p{p}_ms": round(value, 1) for p, value in percentiles(values).items()}


def memory_shares(engine: luban.Engine, limit: int) -> Measured:
    """Share of slots that hold a token, now."""
    running: list[Growing] = list(engine.batch.sequences)
    batch = engine.batch
    reserved = sum(min(len(g.prompt) + limit, engine.model.spec.context) for g in running)
    if isinstance(batch, PagedBatch):
        states = batch.scheduler.running
        size = batch.runner.cache.block_size
        held = len({block for state in states for block in state.table}) * size
        tokens = sum(min(len(state.tokens), len(state.table) * size) for state in states)
    else:
        held = batch.session.cache._real.numel()  # type: ignore[attr-defined]
        tokens = sum(map(len, running))
    whole = len(running) * engine.model.spec.context
    return {"held": tokens / held, "reserved": tokens / reserved, "whole_context": tokens / whole}


def run_engine(engine: luban.Engine, prompts: Prompts, limit: int) -> Measured:
    """All prompts at once."""
    arrived: list[list[float]] = [[] for _ in prompts]
    sampling, shares = luban.Sampling(max_tokens=limit, temperature=0, ignore_eos=True), []
    start = time.perf_counter()
    for prompt, times in zip(prompts, arrived, strict=True):
        engine.submit(Request(prompt, sampling, lambda _, t=times: t.append(time.perf_counter())))
    most, steps, ends = 0, itertools.count(), [start]
    while engine.step():
        ends.append(time.perf_counter())
        if running := len(engine.batch.sequences):
            most = max(most, running)
            if next(steps) % SAMPLED == 0:  # counting takes time
                shares.append(memory_shares(engine, limit))
    seconds = time.perf_counter() - start
    first = [times[0] - start for times in arrived]
    gaps = [b - a for times in arrived for a, b in itertools.pairwise(times)]
    found: Measured = {
        "seconds": round(seconds, 3),
        "output_tokens_per_s": round(len(prompts) * limit / seconds, 1),
        "all_tokens_per_s": round((sum(map(len, prompts)) + len(prompts) * limit) / seconds, 1),
        "together": most,
    }
    found |= milliseconds([b - a for a, b in itertools.pairwise([*ends, start + seconds])], "step") | {
        "steps": len(ends)
    }
    found |= milliseconds(first, "first_token") | milliseconds(gaps, "between_tokens")
    for name in ("held", "reserved", "whole_context"):
        found[f"kv_{name}"] = round(sum(share[name] for share in shares) / max(1, len(shares)), 3)
    return found


def profile(engine: luban.Engine, prompts: Prompts, limit: int, folder: Path) -> None:
    """Tables of kernels: of the first step, which reads prompts, and of a step in which every sequence reads one token."""
    sampling = luban.Sampling(max_tokens=limit, temperature=0, ignore_eos=True)
    folder.mkdir(parents=True, exist_ok=True)
    for prompt in prompts:
        engine.submit(Request(prompt, sampling))
    (folder / f"prefill-{len(prompts)}.txt").write_text(kernel_table(engine.step, steps=1, warm=0))
    while any(len(g.tokens) < 2 for g in engine.batch.sequences):
        engine.step()
    (folder / f"decode-{len(prompts)}.txt").write_text(kernel_table(engine.step, steps=8))
    while engine.step():
        pass


def transformers_runner(model: LoadedModel) -> Callable[[Prompts, int], Measured]:
    """The same weights in transformers, by way of an export."""
    import tempfile

    import transformers

    device, dtype = next(model.module.parameters()).device, next(model.module.parameters()).dtype
    with tempfile.TemporaryDirectory() as folder:
        luban.export_model(model, Path(folder) / "hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf", dtype=dtype).to(device).eval()

    def run(prompts: Prompts, limit: int) -> Measured:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        start = time.perf_counter()
        with torch.inference_mode():
            theirs.generate(
                ids, attention_mask=mask, max_new_tokens=limit, min_new_tokens=limit, do_sample=False, pad_token_id=0
            ).tolist()
        seconds = time.perf_counter() - start
        return {"seconds": round(seconds, 3), "output_tokens_per_s": round(len(prompts) * limit / seconds, 1)}

    return run


def prompts_of(rng: random.Random, count: int, lengths: tuple[int, int], vocabulary: int, shared: int) -> Prompts:
    """Random tokens after `shared` common ones."""
    common = [rng.randrange(vocabulary) for _ in range(shared)]
    return [common + [rng.randrange(vocabulary) for _ in range(rng.randint(*lengths))] for _ in range(count)]


def prefix_hits(engine: luban.Engine, before: int) -> float:
    """Share of the last run's prompt tokens that were in the prefix cache, after `before` tokens that weren't."""
    scheduler = engine.batch.scheduler  # type: ignore[attr-defined]
    found = scheduler.prefix_hits / max(1, scheduler.prompt_tokens - before)
    scheduler.prefix_hits = scheduler.prompt_tokens = 0
    return round(found, 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="", help="bfloat16, float32, int8, fp8; none: by size")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--engines", nargs="+", default=["paged", "contiguous", "transformers"])
    parser.add_argument("--prompt", type=int, nargs=2, default=[32, 512], metavar=("LEAST", "MOST"))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument(
        "--cache-dtype", choices=["auto", "fp8"], default="auto", help="of the paged engines' keys and values"
    )
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="folder for tables of the paged engine's kernels (CUDA)")
    args = parser.parse_args()
    dtype = args.dtype or ("bfloat16" if args.size == "1b" else "float32")
    spec = spec_of(args.size)
    module = luban.build_model(spec, device=args.device, dtype="bfloat16" if dtype in PACKED else dtype).eval()
    if dtype in PACKED:
        pack_for_inference(module, dtype)
    model = LoadedModel(spec=spec, module=module, tokenizer=None, name=args.size, path=Path(), manifest=None)
    runners: dict[str, Callable[[Prompts, int], Measured]] = {}
    begun = time.perf_counter()
    engines = {
        name: luban.Engine(
            model,
            paged=name in PAGED,
            cache_dtype=args.cache_dtype if name in PAGED else "auto",
            plan=ParallelPlan(tensor=args.tensor if name in PAGED else 1),
        )
        for name in args.engines
        if name in (*PAGED, "contiguous")
    }
    if "in_order" in engines:
        engines["in_order"].batch.runs_ahead = False  # type: ignore[attr-defined]
    facts = {"engine_start_s": round(time.perf_counter() - begun, 2)}
    for name, engine in engines.items():
        runners[name] = lambda prompts, limit, engine=engine: run_engine(engine, prompts, limit)
    if "transformers" in args.engines:
        runners["transformers"] = transformers_runner(model)
    for count in args.requests:
        for name, run in runners.items():
            drawn = [
                prompts_of(
                    random.Random(f"{args.seed} {count} {which}"), count, tuple(args.prompt), spec.vocab_size, shared
                )
                for which, shared in (("warm-up", 0), ("measured", args.shared), ("profiled", 0))
            ]
            run(drawn[0], min(args.tokens, 4))  # other prompts, so that none is found in the prefix cache
            row = run(drawn[1], args.tokens)
            if name in PAGED:
                row["prefix_hits"] = prefix_hits(engines[name], sum(map(len, drawn[0])))
            print(json.dumps({"engine": name, "requests": count, **row}), flush=True)
            if name in PAGED and args.profile:
                profile(engines[name], drawn[2], 32, args.profile / name)
    chip = torch.cuda.get_device_name() if args.device != "cpu" else platform.processor()
    print(
        json.dumps(
            facts
            | {key: str(value) for key, value in vars(args).items()}
            | {"dtype": dtype, "chip": chip, "cores": os.cpu_count(), "torch": torch.__version__}
        )
    )
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
