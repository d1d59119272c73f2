"""Decoding speed of the serving engine with many LoRA adapters in one batch, beside the same engine without.

    python benchmarks/serve_adapters.py [--size tiny|small|1b] [--adapters 8] [--rank 16] [--requests 64] [--rounds 3]

Random weights, adapters and prompts, greedy, whole requests through `luban.Engine`, all submitted at once (128 tokens in, 128 out).
Adapters of the given rank on all linear layers are written in PEFT's layout and served by name. Cases: no request has an adapter,
all have the same one, each has one of all in turn; they take turns for --rounds rounds after a warm-up, in one engine. Tokens a
second while all requests decode (from the last first token to the end), and over the whole time, prompts included; medians and
ranges, and the share of the rate without adapters. Checked on a GPU at 1b: with all adapters at least 0.8 of it while decoding.
Exits 1 where it is less. --profile writes tables of the kernels of a decoding step (CUDA). Sizes: see `serve.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from kernel_table import kernel_table
from safetensors.torch import save_file
from serve import SIZES, Prompts, prompts_of, spec_of

import luban
from luban.load.model import LoadedModel

WANTED = 0.8  # of the rate without adapters


def write_adapter(folder: Path, size: str, rank: int, seed: int) -> Path:
    """LoRA with random factors on all linear layers of a LLaMA shape, as PEFT writes it."""
    _, width, layers, heads, key_heads, inner, _ = SIZES[size]
    keys = width // heads * key_heads
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width, keys),
        "self_attn.v_proj": (width, keys),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (width, inner),
        "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
    }
    random_numbers, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(layers):
        for name, (inputs, outputs) in shapes.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(rank, inputs, generator=random_numbers) / inputs**0.5
            tensors[f"{at}.lora_B.weight"] = torch.randn(outputs, rank, generator=random_numbers) / 100
    folder.mkdir(parents=True)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in shapes]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def run(engine: luban.Engine, prompts: Prompts, names: list[str], limit: int) -> dict[str, float]:
    """All prompts at once, each with its adapter."""
    arrived: list[list[float]] = [[] for _ in prompts]
    sampling = luban.Sampling(max_tokens=limit, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    for prompt, name, times in zip(prompts, names, arrived, strict=True):
        request = engine.request(prompt, sampling, lambda delta, t=times: t.append(time.perf_counter()))
        engine.use_adapter(request, name)
        engine.submit(request)
    while engine.step():
        pass
    end = time.perf_counter()
    assert all(len(times) == limit for times in arrived)
    decoding = max(times[0] for times in arrived)  # from here on no prompt is read
    counted = sum(at > decoding for times in arrived for at in times)
    return {
        "decode_tokens_per_s": counted / (end - decoding),
        "output_tokens_per_s": len(prompts) * limit / (end - start),
        "first_token_ms": 1000 * (decoding - start),
    }


def profile(engine: luban.Engine, prompts: Prompts, names: list[str], file: Path) -> None:
    """A table of the kernels of steps in which every sequence reads one token."""
    sampling = luban.Sampling(max_tokens=32, temperature=0, ignore_eos=True)
    for prompt, name in zip(prompts, names, strict=True):
        request = engine.request(prompt, sampling)
        engine.use_adapter(request, name)
        engine.submit(request)
    while len(engine.batch.sequences) < len(prompts) or any(len(g.tokens) < 2 for g in engine.batch.sequences):
        engine.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(kernel_table(engine.step, steps=8))
    while engine.step():
        pass


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of every prompt")
    parser.add_argument("--tokens", type=int, default=128, help="of every answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", type=Path, help="folder for tables of kernels (CUDA)")
    args = parser.parse_args()
    spec = spec_of(args.size)
    dtype = "bfloat16" if args.size == "1b" else "float32"
    module = luban.build_model(spec, device=args.device, dtype=dtype).eval()
    model = LoadedModel(spec=spec, module=module, tokenizer=None, name=args.size, path=Path(), manifest=None)
    known = [f"adapter{i}" for i in range(args.adapters)]
    cases = {0: [""], 1: known[:1], args.adapters: known}
    found: dict[int, list[dict[str, float]]] = {count: [] for count in cases}
    with tempfile.TemporaryDirectory() as folder:
        made = {name: write_adapter(Path(folder) / name, args.size, args.rank, i) for i, name in enumerate(known)}
        begun = time.perf_counter()
        engine = luban.Engine(model, adapters=made, max_adapters=args.adapters)
        print(json.dumps({"engine_start_s": round(time.perf_counter() - begun, 2)}), flush=True)
    for turn in range(args.rounds + 1):
        for count, names in cases.items():
            rng = random.Random(f"{turn} {count}")  # prompts that no run before has read
            prompts = prompts_of(rng, args.requests, (args.prompt, args.prompt), spec.vocab_size, 0)
            asked = [names[i % len(names)] for i in range(args.requests)]
            row = run(engine, prompts, asked, args.tokens if turn else min(args.tokens, 16))
            if turn:
                found[count].append(row)
    rates = {count: statistics.median(row["decode_tokens_per_s"] for row in rows) for count, rows in found.items()}
    for count, rows in found.items():
        table: dict[str, object] = {"adapters": count, "requests": args.requests}
        for name in rows[0]:
            values = [row[name] for row in rows]
            table[name] = round(statistics.median(values), 1)
            table[f"{name}_range"] = [round(min(values), 1), round(max(values), 1)]
        table["share_of_base"] = round(rates[count] / rates[0], 3)
        print(json.dumps(table), flush=True)
    if args.profile:
        for count, names in cases.items():
            prompts = prompts_of(random.Random(f"profile {count}"), args.requests, (16, 16), spec.vocab_size, 0)
            asked = [names[i % len(names)] for i in range(args.requests)]
            profile(engine, prompts, asked, args.profile / f"adapters-{count}.txt")
    chip = torch.cuda.get_device_name() if args.device != "cpu" else platform.processor()
    facts = {key: str(value) for key, value in vars(args).items()}
    print(json.dumps(facts | {"dtype": dtype, "chip": chip, "cores": os.cpu_count(), "torch": torch.__version__}))
    share = rates[args.adapters] / rates[0]
    if args.device == "cuda" and args.size == "1b" and share < WANTED:
        print(f"with {args.adapters} adapters {share:.3f} of the rate without, less than {WANTED}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
