"""Tokens a second, utilisation and memory of training steps on one GPU, beside transformers and plain PyTorch.

    python benchmarks/gpu_step.py [--only NAME …] [--gpus 3] [--steps 10] [--out FILE.json] [--tiny]

A 1.1B LLaMA shape: 22 layers, width 2,048, feed-forward 5,632, 32,000 words, 4 key heads, sequences of 2,048, random
tokens, no document boundaries. Every contestant runs in a process of its own, so that memory is its own too; those that are
compared run on one GPU, one after another, and with --gpus 3 three such groups run at once. Step times are medians over
CUDA events after warm-up.

Model FLOPs a token: 6·(parameters − input embedding) + 6·layers·(heads·head width)·T, attention's causal half. The peak
that utilisation refers to is the dense bf16 rate of the vendor's table (`luban/planner/accelerators.toml`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from on_gpus import side_by_side
from plain_model import Plain
from torch import nn

from luban.kernels import dispatch, gated
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.parallel.compile import loss_function
from luban.parallel.engine import TrainStep
from luban.parallel.precision import COMPUTE, LossScale, Masters
from luban.train.recipe import TrainConfig
from luban.train.run import prepare_blocks

T = 2048
SHAPE = {"width": 2048, "inner": 5632, "layers": 22, "vocab": 32_000, "kv_heads": 4}
TINY = {"width": 128, "inner": 352, "layers": 3, "vocab": 512, "kv_heads": 2}

ALL_BF16 = {"weights": "bf16", "moments": "bf16"}

Contestant = tuple[str, int, int, dict[str, str]]  # who, heads, batch, settings
COMPARED: list[dict[str, Contestant]] = [  # what runs on one chip, one after another
    {"transformers-8": ("transformers", 32, 8, {}),
     "transformers-16": ("transformers", 32, 16, {}),
     "luban-64": ("luban", 32, 16, ALL_BF16),
     "luban-64-cudnn": ("luban", 32, 16, {**ALL_BF16, "attention": "cudnn"}),
     "luban-64-apart": ("luban", 32, 16, {**ALL_BF16, "gated": "no"})},
    {"plain-128": ("plain", 16, 16, {}),
     "luban-128": ("luban", 16, 16, ALL_BF16),
     "luban-128-fp8": ("luban", 16, 16, {**ALL_BF16, "precision": "fp8"})},
    {"luban-128-stochastic": ("luban", 16, 16, {**ALL_BF16, "moments": "fp32", "recompute": "cheap"}),
     "luban-128-master": ("luban", 16, 16, {"weights": "fp32", "moments": "fp32", "recompute": "cheap"}),
     "luban-128-cheap": ("luban", 16, 16, {**ALL_BF16, "recompute": "cheap"}),
     "luban-128-blocks": ("luban", 16, 16, {**ALL_BF16, "recompute": "blocks"})},
]  # fmt: skip
CONTESTANTS = {name: contestant for group in COMPARED for name, contestant in group.items()}


def model_flops(shape: dict[str, int], heads: int, seq: int) -> float:
    """Training FLOPs a token by the formula above."""
    width, head = shape["width"], shape["width"] // heads
    layer = width * (2 * width + 2 * shape["kv_heads"] * head) + 3 * width * shape["inner"] + 2 * width
    counted = shape["layers"] * layer + width + shape["vocab"] * width
    return 6 * counted + 6 * shape["layers"] * width * seq


def transformers_step(shape: dict[str, int], heads: int, batch: int, seq: int, device: str) -> Callable[[], object]:
    """LlamaForCausalLM in bf16, compiled, with torch's fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=shape["vocab"], hidden_size=shape["width"], intermediate_size=shape["inner"],
                         num_hidden_layers=shape["layers"], num_attention_heads=heads,
                         num_key_value_heads=shape["kv_heads"], max_position_embeddings=seq, use_cache=False,
                         attn_implementation="sdpa")  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        tokens = torch.randint(0, shape["vocab"], (batch, seq), device=device)
        optimizer.zero_grad(set_to_none=True)
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def plain_step(shape: dict[str, int], heads: int, batch: int, seq: int, device: str) -> Callable[[], object]:
    """The plain model in bf16 with cuDNN's attention, compiled as a whole, with torch's fused AdamW."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.device(device):
        module = Plain(vocabulary=shape["vocab"], width=shape["width"], layers=shape["layers"], heads=heads,
                       kv_heads=shape["kv_heads"], inner=shape["inner"], seq=seq)  # fmt: skip
    module.to(torch.bfloat16)
    compiled = torch.compile(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        tokens = torch.randint(0, shape["vocab"], (batch, seq), device=device)
        optimizer.zero_grad(set_to_none=True)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            compiled(tokens, tokens).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return step


def luban_trainer(shape: dict[str, int], heads: int, batch: int, seq: int, device: str, settings: dict[str, str],
                  lr: float = 1e-4, changed: float = 0.0) -> tuple[TrainStep, nn.Module]:  # fmt: skip
    """The trainer's own step and its module, its first weights changed by this share of them."""
    spec = uniform(vocab_size=shape["vocab"], width=shape["width"], layers=shape["layers"], context=seq,
                     mixer=Grouped(heads=heads, kv_heads=shape["kv_heads"]),
                     feedforward=SwiGLU(width=shape["inner"]))  # fmt: skip
    train = TrainConfig(precision=settings.get("precision", "bf16"), weights=settings["weights"], batch_size=batch,
                        seq_len=seq, remat=settings.get("recompute", "none"))  # fmt: skip
    module = build_model(spec, device=torch.device(device), seed=0)
    with torch.no_grad():
        for weight in module.parameters() if changed else ():
            weight.mul_(1 + changed * torch.randn_like(weight))
    masters = Masters(module, COMPUTE[train.precision], split=train.weights == "fp32")
    prepare_blocks(module, train)
    if settings.get("gated") == "no":  # SwiGLU as kernels of its own, not in the products
        gated.serves = lambda *_: False
    step = TrainStep(loss_function(module, Causal(), compiled=True, regions=True), masters,
                     AdamW(lr=lr, moments=settings["moments"]).build(masters.parameters),
                     LossScale.of(train.precision), clip=1.0, accumulate=1, device=torch.device(device))  # fmt: skip
    return step, module


def luban_step(shape: dict[str, int], heads: int, batch: int, seq: int, device: str,
               settings: dict[str, str]) -> Callable[[], object]:  # fmt: skip
    """The trainer's own step on random tokens."""
    step, _ = luban_trainer(shape, heads, batch, seq, device, settings)

    def run() -> None:
        with dispatch.using(settings.get("attention")):
            step.launch(RandomBatch(batch, seq, shape["vocab"]), 1.0)

    return run


class RandomBatch:
    """Random tokens without document boundaries."""

    def __init__(self, batch: int, seq: int, vocabulary: int):
        self.target_count = self.tokens_read = batch * seq
        self.ids = torch.randint(0, vocabulary, (batch, seq + 1)).numpy()

    def arrays(self):
        return self.ids[:, :-1], self.ids[:, 1:], self.ids[:, 1:] >= 0


def contest(name: str, steps: int, tiny: bool, profile: str | None) -> dict[str, float]:
    """Run one contestant in this process."""
    who, heads, batch, settings = CONTESTANTS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, seq = (TINY, 64) if tiny else (SHAPE, T)
    heads, batch = (heads // 4, 2) if tiny else (heads, batch)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    makers = {"transformers": transformers_step, "plain": plain_step, "luban": luban_step}
    extra = (settings,) if who == "luban" else ()
    step = makers[who](shape, heads, batch, seq, device, *extra)
    began = time.perf_counter()
    step()
    _synchronize()
    first = time.perf_counter() - began
    for _ in range(4):
        step()
    _synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with Sampled() as sampled:
        times = timed(step, steps)
    if profile:
        Path(profile).write_text(kernel_table(step))
    seconds = statistics.median(times)
    flops = model_flops(shape, heads, seq) * batch * seq / seconds
    return {"tokens_per_second": batch * seq / seconds, "step_ms": 1e3 * seconds, "min_ms": 1e3 * min(times),
            "max_ms": 1e3 * max(times), "tflops": flops / 1e12, "utilisation": flops / 989.4e12,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
            "first_step_s": first, **sampled.means()}  # fmt: skip


class Sampled:
    """Clock and power of this process's GPU meanwhile, as nvidia-smi reads them: at its power limit a chip slows down, and
    what is saved elsewhere goes into lower clocks."""

    def __enter__(self) -> Sampled:
        self.process = None
        if torch.cuda.is_available():
            query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "100",
                     "-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0")]  # fmt: skip
            self.process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.terminate()

    def means(self) -> dict[str, float]:
        """Means of the second half of the readings."""
        lines = self.process.communicate()[0].strip().splitlines() if self.process else []
        rows = [tuple(map(float, line.split(","))) for line in lines if line.count(",") == 1]
        rows = rows[len(rows) // 2 :]
        if not rows:
            return {}
        return {"sm_mhz": statistics.fmean(r[0] for r in rows), "watts": statistics.fmean(r[1] for r in rows)}


def kernel_table(step: Callable[[], object], steps: int = 3) -> str:
    """Where the device's time goes in some steps without a pause: kernels by name, and where it waits."""
    for _ in range(steps):
        step()  # power and clocks settle under load
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            step()
        _synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        trace.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    work = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events
                  if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))  # fmt: skip
    if not work:
        return "no kernels\n"
    spans: dict[str, list[float]] = {}
    waits: dict[tuple[str, str], list[float]] = {}
    end, before, busy = work[0][0], "", 0.0
    for start, stop, name in work:
        spans.setdefault(name, []).append(stop - start)
        if start > end and before:
            waits.setdefault((before[:60], name[:60]), []).append(start - end)
        busy += max(0.0, stop - max(start, end))
        end, before = max(end, stop), name
    whole = end - work[0][0]
    lines = [f"{steps} steps: {whole / steps / 1e3:.1f} ms each, {len(work) // steps} kernels, busy {100 * busy / whole:.1f}%",
             "ms a step   calls   µs each   kernel"]  # fmt: skip
    for name, found in sorted(spans.items(), key=lambda item: -sum(item[1])):
        lines.append(
            f"{sum(found) / steps / 1e3:9.2f} {len(found) / steps:7.0f} {statistics.fmean(found):9.1f}   {name[:150]}"
        )
    lines.append("ms a step   times   µs each   waits between kernels")
    for (a, b), found in sorted(waits.items(), key=lambda item: -sum(item[1]))[:40]:
        lines.append(
            f"{sum(found) / steps / 1e3:9.2f} {len(found) / steps:7.0f} {statistics.fmean(found):9.1f}   {a} → {b}"
        )
    return "\n".join(lines) + "\n"


def timed(step: Callable[[], object], steps: int) -> list[float]:
    """Seconds of each step."""
    if not torch.cuda.is_available():
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", type=Path, help="folder for a table of kernels of each contestant")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    call = parser.parse_args()
    if call.inside:
        print(json.dumps(contest(call.inside, call.steps, call.tiny,
                                 str(call.profile / f"{call.inside}.txt") if call.profile else None)))  # fmt: skip
        return
    found: dict[str, dict[str, float]] = {}
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, "
          f"{call.gpus} at once")  # fmt: skip
    options = [*(["--tiny"] if call.tiny else []), *(["--profile", call.profile] if call.profile else [])]
    jobs = [{name: [sys.executable, __file__, "--inside", name, "--steps", call.steps, *options]
             for name in group if name in call.only} for group in COMPARED]  # fmt: skip
    with tempfile.TemporaryDirectory() as logs:
        for name, status, lines in side_by_side([job for job in jobs if job], call.gpus, Path(logs)):
            if status:
                print(f"{name:24s} failed: {' '.join(lines[-4:])[-800:]}", flush=True)
                continue
            found[name] = row = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
            print(f"{name:24s} {row['tokens_per_second'] / 1e3:7.1f}k tokens/s  {row['step_ms']:7.1f} ms "
                  f"({row['min_ms']:.1f} to {row['max_ms']:.1f})  {100 * row['utilisation']:5.1f}% of 989  "
                  f"{row['peak_gb']:5.1f} GB  first step {row['first_step_s']:.0f} s"
                  + (f"  {row['sm_mhz']:.0f} MHz {row['watts']:.0f} W" if "watts" in row else ""), flush=True)  # fmt: skip
            if call.out:
                call.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
