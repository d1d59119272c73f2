"""Step time, model FLOPs utilisation (MFU) and peak memory of training steps on one GPU, beside transformers and plain
PyTorch.

    python benchmarks/gpu_step.py [--only NAME …] [--attention auto cudnn] [--gpus 3] [--steps 10] [--out FILE.json] [--tiny]

A LLaMA shape of 1.1B parameters: 22 layers, width 2,048, feed-forward 5,632, vocabulary 32,000, 4 key heads, sequences of
2,048, random tokens, no document boundaries. Names that hold 64 and 128 say the head dim. Luban's runs are repeated with each
kernel of --attention: `auto` takes FlashAttention-4 where flash-attn-4 is installed, and `flash4`, `cudnn`, `luban` and
`flash2` ask for one kernel by name.

Every run has a process of its own, so that its memory is its own too. Runs that are compared take turns on one GPU, and with
--gpus 3 the three groups of such runs share three GPUs. Step times are medians over CUDA events after warm-up.

Model FLOPs a token: 6·(parameters − input embedding) + 6·layers·(heads·head dim)·T, where attention counts its causal half.
MFU is relative to 989.4 TFLOP/s, the dense bf16 peak of an H100 SXM (`luban/planner/accelerators.toml`).
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from kernel_table import kernel_table
from on_gpus import side_by_side
from plain_model import Plain
from torch import Tensor, nn

from luban.core.plan import ParallelPlan
from luban.data.batch import Batch
from luban.kernels import gated
from luban.kernels.dispatch import NAMES, flash4_missing
from luban.models.build import build_model
from luban.models.spec import ModelSpec, uniform
from luban.nn.attention.backend import AttentionBackend
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.parallel.apply import Execution, apply
from luban.parallel.engine import TrainEngine

T = 2048
PEAK = 989.4e12  # FLOP/s, dense bf16, H100 SXM
SHAPE = {"width": 2048, "inner": 5632, "layers": 22, "vocab": 32_000, "kv_heads": 4}
TINY = {"width": 128, "inner": 352, "layers": 3, "vocab": 512, "kv_heads": 2}

ALL_BF16 = {"weights": "bf16", "moments": "bf16"}

Contestant = tuple[str, int, int, dict[str, str]]  # library, heads, rows of a batch, settings
COMPARED: list[dict[str, Contestant]] = [  # each group runs on one GPU, one after another
    {
        "transformers-8": ("transformers", 32, 8, {}),
        "transformers-16": ("transformers", 32, 16, {}),
        "luban-64": ("luban", 32, 16, ALL_BF16),
        "luban-64-unfused": ("luban", 32, 16, {**ALL_BF16, "swiglu": "unfused"}),
    },
    {
        "plain-128": ("plain", 16, 16, {}),
        "luban-128": ("luban", 16, 16, ALL_BF16),
        "luban-128-fp8": ("luban", 16, 16, {**ALL_BF16, "precision": "fp8"}),
    },
    {
        "luban-128-stochastic": ("luban", 16, 16, {**ALL_BF16, "moments": "fp32", "remat": "selective"}),
        "luban-128-masters": ("luban", 16, 16, {"weights": "fp32", "moments": "fp32", "remat": "selective"}),
        "luban-128-selective": ("luban", 16, 16, {**ALL_BF16, "remat": "selective"}),
        "luban-128-full": ("luban", 16, 16, {**ALL_BF16, "remat": "full"}),
    },
]
CONTESTANTS = {name: contestant for group in COMPARED for name, contestant in group.items()}


def model_flops(shape: dict[str, int], heads: int, seq: int) -> float:
    """Training FLOPs a token by the formula above."""
    width, head = shape["width"], shape["width"] // heads
    layer = width * (2 * width + 2 * shape["kv_heads"] * head) + 3 * width * shape["inner"] + 2 * width
    counted = shape["layers"] * layer + width + shape["vocab"] * width
    return 6 * counted + 6 * shape["layers"] * width * seq


def llama_config(shape: dict[str, int], heads: int, seq: int) -> Any:
    """transformers' configuration of this shape, with torch's attention."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=heads,
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=seq,
        use_cache=False,
        attn_implementation="sdpa",
    )


def transformers_step(shape: dict[str, int], heads: int, batch: int, seq: int, device: str) -> Callable[[], object]:
    """LlamaForCausalLM in bf16, compiled, with torch's fused AdamW."""
    from transformers import LlamaForCausalLM

    config = llama_config(shape, heads, seq)
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
        module = Plain(
            vocabulary=shape["vocab"],
            width=shape["width"],
            layers=shape["layers"],
            heads=heads,
            kv_heads=shape["kv_heads"],
            inner=shape["inner"],
            seq=seq,
        )
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


def luban_spec(shape: dict[str, int], heads: int, seq: int) -> ModelSpec:
    """The model of this shape."""
    return uniform(
        vocab_size=shape["vocab"],
        width=shape["width"],
        layers=shape["layers"],
        context=seq,
        mixer=Grouped(heads=heads, kv_heads=shape["kv_heads"]),
        feedforward=SwiGLU(width=shape["inner"]),
    )


def luban_engine(
    spec: ModelSpec,
    settings: dict[str, str],
    device: str,
    *,
    kernel: str = "auto",
    lr: float = 1e-4,
    init: Mapping[str, Tensor] | int = 0,
) -> TrainEngine:
    """The model in training as `luban pretrain --train.compile true` makes it ready.

    Args:
        kernel: of attention. init: the first weights by name, or the seed that they are drawn from.
    """
    loss = Causal().loss(build_model(spec, device="meta"), AttentionBackend(kernel))
    execution = Execution(
        device=torch.device(device),
        precision=settings.get("precision", "bf16"),
        masters=settings["weights"] == "fp32",
        compile=True,
    )
    return apply(
        loss,
        ParallelPlan(remat=settings.get("remat", "none")),
        AdamW(lr=lr, moments=settings["moments"]),
        execution=execution,
        init=init,
    )


def luban_step(
    shape: dict[str, int], heads: int, batch: int, seq: int, device: str, settings: dict[str, str], kernel: str
) -> Callable[[], object]:
    """The trainer's own step on random tokens, not waited for."""
    if settings.get("swiglu") == "unfused":  # SwiGLU as kernels of its own instead of inside the matmuls around it
        gated.serves = lambda *_: False
    engine = luban_engine(luban_spec(shape, heads, seq), settings, device, kernel=kernel)
    return lambda: engine.submit(RandomBatch(batch, seq, shape["vocab"]))


class RandomBatch:
    """Random tokens, one document a row."""

    cut = Batch.cut

    def __init__(self, batch: int, seq: int, vocabulary: int):
        self.target_count = self.tokens_read = batch * seq
        self.ids = torch.randint(0, vocabulary, (batch, seq + 1)).numpy()
        self.tokens = self.ids[:, :-1]

    def arrays(self):
        return {"tokens": self.tokens, "targets": self.ids[:, 1:], "loss_mask": self.ids[:, 1:] >= 0}


def contest(name: str, steps: int, tiny: bool, kernel: str, profile: Path | None) -> dict[str, float]:
    """Run one contestant in this process.

    Args:
        profile: file for its table of kernels; None: it isn't profiled.
    """
    library, heads, batch, settings = CONTESTANTS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, seq = (TINY, 64) if tiny else (SHAPE, T)
    heads, batch = (heads // 4, 2) if tiny else (heads, batch)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    makers = {"transformers": transformers_step, "plain": plain_step, "luban": luban_step}
    extra = (settings, kernel) if library == "luban" else ()
    step = makers[library](shape, heads, batch, seq, device, *extra)
    began = time.perf_counter()
    step()
    _synchronize()
    first = time.perf_counter() - began
    for _ in range(4):
        step()
    _synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with ClockAndPower() as measured:
        times = timed(step, steps)
    if profile:
        profile.parent.mkdir(parents=True, exist_ok=True)
        profile.write_text(kernel_table(step))
    seconds = statistics.median(times)
    flops = model_flops(shape, heads, seq) * batch * seq / seconds
    return {
        "tokens_per_second": batch * seq / seconds,
        "step_ms": 1e3 * seconds,
        "min_ms": 1e3 * min(times),
        "max_ms": 1e3 * max(times),
        "tflops": flops / 1e12,
        "mfu": flops / PEAK,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
        "first_step_s": first,
        **measured.means(),
    }


class ClockAndPower:
    """Clock and power of this process's GPU inside the context, as nvidia-smi reads them. At its power limit a GPU lowers
    its clock, so that a step which needs less power a FLOP runs at a higher one."""

    def __enter__(self) -> ClockAndPower:
        self.process = None
        if torch.cuda.is_available():
            query = [
                "nvidia-smi",
                "--query-gpu=clocks.sm,power.draw",
                "--format=csv,noheader,nounits",
                "-lms",
                "100",
                "-i",
                os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
            ]
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


def jobs_of(call: argparse.Namespace) -> list[dict[str, list]]:
    """The commands of every group, by the name of the run."""
    options = ["--steps", call.steps, *["--tiny"] * call.tiny]
    options += ["--profile", call.profile] if call.profile else []
    jobs = []
    for group in COMPARED:
        job = {}
        for name in filter(call.only.__contains__, group):
            for kernel in call.attention if group[name][0] == "luban" else ["auto"]:
                shown = name if kernel == "auto" else f"{name}-{kernel}"
                job[shown] = [sys.executable, __file__, "--inside", name, "--attention", kernel, *options]
        jobs.append(job)
    return [job for job in jobs if job]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="*",
        default=list(CONTESTANTS),
        choices=list(CONTESTANTS),
        metavar="NAME",
        help=f"some of {', '.join(CONTESTANTS)}",
    )
    parser.add_argument(
        "--attention",
        nargs="+",
        default=["auto"],
        choices=["auto", *NAMES],
        metavar="KERNEL",
        help=f"of Luban's runs, one run each: auto, {', '.join(NAMES)}",
    )
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", type=Path, help="folder for a table of kernels of each run")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    call = parser.parse_args()
    if call.inside:
        kernel = call.attention[0]
        profile = call.profile and call.profile / f"{call.inside}-{kernel}.txt"
        print(json.dumps(contest(call.inside, call.steps, call.tiny, kernel, profile)))
        return
    if call.profile and not torch.cuda.is_available():
        parser.error("--profile records kernels of a GPU, and torch sees none here")
    found: dict[str, dict[str, float]] = {}
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, "
        f"{call.gpus} at once; flash-attn-4: {flash4_missing() or 'installed'}; "
        f"quack-kernels: {gated.missing() or 'installed'}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as logs:
        for name, status, lines in side_by_side(jobs_of(call), call.gpus, Path(logs)):
            if status:
                errors = [line for line in lines if "Error" in line] or lines or [f"exit status {status}"]
                print(f"{name:24s} failed: {errors[-1][-800:]}", flush=True)
                continue
            found[name] = row = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
            print(
                f"{name:24s} {row['tokens_per_second'] / 1e3:7.1f}k tokens/s  {row['step_ms']:7.1f} ms "
                f"({row['min_ms']:.1f} to {row['max_ms']:.1f})  MFU {100 * row['mfu']:5.1f}%  "
                f"peak {row['peak_gb']:5.1f} GB  first step {row['first_step_s']:.0f} s"
                + (f"  {row['sm_mhz']:.0f} MHz {row['watts']:.0f} W" if "watts" in row else ""),
                flush=True,
            )
            if call.out:
                call.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
