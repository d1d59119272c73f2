"""Length extrapolation: what each position method makes of texts longer than those that it was trained on.

    python benchmarks/length_extrapolation.py --device cuda --out length            # one H100, minutes
    python benchmarks/length_extrapolation.py --quick --out length                  # a CPU, under a minute: shows that it runs

Small decoders that differ in their positions alone are trained on characters (bytes of UTF-8) at one length and read
held-out text at up to eight times that length. At every length the same characters are scored, the last part of each
window, so that lengths differ only in how much comes before: windows of length L end where those of all other lengths
end, and a method that can use a longer past gains. Three seeds; bits a character, mean and standard error.

Published order (Chi et al. 2022, table 3; Press et al. 2022, figure 4) at four times the trained length, which is
checked here: log-KERPLE ≤ power-KERPLE ≤ ALiBi, ties within one standard error, far below RoPE; sinusoidal worst (of
those that mark positions: “none” is in neither table).

The text: Python sources of this Python's standard library and packages, the first 64 MB in the order of their hashes, or a
file or folder given by --data. Writes OUT.json and OUT.svg and prints a table; exits 1 where the order isn't met.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from on_gpus import visible
from torch import Tensor

from luban import build_model
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.layout import Blockwise
from luban.nn.position.alibi import Alibi
from luban.nn.position.base import Position
from luban.nn.position.kerple import KerpleLog, KerplePower
from luban.nn.position.none import NoPosition
from luban.nn.position.randomised import Randomised
from luban.nn.position.rope import Rope
from luban.nn.position.sinusoidal import Sinusoidal
from luban.nn.position.t5 import RelativeBias
from luban.nn.position.xpos import XPos
from luban.report.chart import LEFT, Chart, Series, draw

BLOCKWISE = "xPos, blockwise"  # trained as xPos; half a training row and the one before it are seen (Sun et al. 2022)
BYTES = 256  # characters there are
MOST_BYTES = 64_000_000  # of text


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The experiment's size."""

    width: int = 256
    layers: int = 6
    heads: int = 8
    trained: int = 256  # characters a training row
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)  # read
    judged: int = 1024  # length at which the order is checked
    batch: int = 64  # rows a step
    steps: int = 3600
    lr: float = 2e-3  # peak, of AdamW
    faster: int = 10  # times the rate for what a position method learns, whose few numbers have far to go in few steps
    warmup: int = 100
    seeds: int = 3
    windows: int = 512  # scored at every length, the last `trained` characters of each


QUICK = Setting(
    width=64,
    layers=2,
    heads=4,
    trained=64,
    lengths=(64, 128, 256),
    judged=256,
    batch=16,
    steps=100,
    warmup=20,
    seeds=1,
    windows=64,
)


def methods(setting: Setting) -> dict[str, Position]:
    """Name → position method. A table of learned positions has no row beyond its length, so it isn't here."""
    return {
        "KERPLE log": KerpleLog(),
        "KERPLE power": KerplePower(),
        "ALiBi": Alibi(),
        "T5": RelativeBias(max_distance=min(128, setting.trained)),
        "xPos": XPos(),
        BLOCKWISE: XPos(),
        "none": NoPosition(),
        "randomised RoPE": Randomised(inner=Rope(), longest=2 * max(setting.lengths)),
        "RoPE": Rope(),
        "sinusoidal": Sinusoidal(),
    }


def model_spec(setting: Setting, name: str) -> ModelSpec:
    """LLaMA's parts with the position method of this name."""
    span = setting.trained // 2
    layout = Blockwise(block=min(64, span), span=span) if name == BLOCKWISE else None
    return uniform(
        vocab_size=BYTES,
        width=setting.width,
        layers=setting.layers,
        context=setting.trained,
        position=methods(setting)[name],
        mixer=Grouped(heads=setting.heads, layout=layout),
        feedforward=SwiGLU(width=setting.width * 8 // 3 // 32 * 32),
    )


def read_text(data: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """(trained, held out) bytes. Files fall on either side whole, by the hash of their text; one file is cut at 95%."""
    if data is not None and data.is_file():
        text = np.frombuffer(data.read_bytes(), dtype=np.uint8)
        return text[: len(text) * 19 // 20], text[len(text) * 19 // 20 :]
    roots = [data] if data else [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    left_out = {"test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
    files = {
        f for root in roots for f in root.rglob("*" if data else "*.py") if f.is_file() and not left_out & set(f.parts)
    }
    texts = {f.read_bytes() for f in files}
    marked = sorted((hashlib.sha256(text).digest(), text) for text in texts)
    sizes = itertools.accumulate(len(text) for _, text in marked)
    marked = [each for each, size in zip(marked, sizes, strict=True) if size <= MOST_BYTES]
    marked.sort(key=lambda each: each[0][::-1])  # which side a file is on is no matter of where it stands
    held = b"\n".join(text for mark, text in marked if mark[-1] < 13)  # 13 of 256: 5%
    kept = b"\n".join(text for mark, text in marked if mark[-1] >= 13)
    return np.frombuffer(kept, dtype=np.uint8), np.frombuffer(held, dtype=np.uint8)


def training_starts(text: Tensor, setting: Setting, seed: int) -> Tensor:
    """(steps, batch) first characters of the rows of every step, the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    last = len(text) - setting.trained - 1
    return torch.randint(0, last, (setting.steps, setting.batch), generator=generator).to(text.device)


def rate(step: int, *, warmup: int, steps: int) -> float:
    """Share of the peak learning rate: up over the warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def train(spec: ModelSpec, setting: Setting, text: Tensor, seed: int, *, compiled: bool) -> dict[str, Tensor]:
    """The fp32 parameters after training. On a GPU the module computes in bf16 and the optimizer steps fp32 masters."""
    device = text.device
    module = build_model(spec, device=device, dtype="bfloat16" if device.type == "cuda" else "float32", seed=seed)
    working = dict(module.named_parameters())
    masters = {name: p.detach().to(device) for name, p in build_model(spec, seed=seed).named_parameters()}
    learned = [m for name, m in masters.items() if name.startswith("decoder.position.")]
    others = [m for name, m in masters.items() if not name.startswith("decoder.position.")]
    groups = [
        {"params": tensors, "weight_decay": decay, "lr": torch.zeros((), device=device)}
        for tensors, decay in ((others, 0.1), (learned, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True, capturable=device.type == "cuda")
    for master in masters.values():
        master.grad = torch.empty_like(master)
    along = torch.arange(setting.trained + 1, device=device)
    starts = training_starts(text, setting, seed)
    shares = [rate(step, warmup=setting.warmup, steps=setting.steps) for step in range(setting.steps)]
    rates = torch.tensor([share * setting.lr for share in shares], device=device)
    now = torch.zeros(1, dtype=torch.int64, device=device)  # the step

    def mean_loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(module(tokens).flatten(0, 1).float(), targets.flatten())

    loss_of = torch.compile(mean_loss, dynamic=False) if compiled else mean_loss

    def step() -> None:  # all that changes from step to step lies on the device
        rows = text[starts[now].T + along].long()
        loss_of(rows[:, :-1], rows[:, 1:]).backward()
        torch._foreach_copy_([m.grad for m in masters.values()], [p.grad for p in working.values()])
        for parameter in working.values():
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(list(masters.values()), 1.0)
        for group, times in zip(optimizer.param_groups, (1, setting.faster), strict=True):
            group["lr"].copy_(rates[now].squeeze(0) * times)
        optimizer.step()
        torch._foreach_copy_([p.data for p in working.values()], list(masters.values()))
        now.add_(1)

    torch.manual_seed(seed)  # of randomised positions
    repeat(step, setting.steps, record=device.type == "cuda" and not isinstance(spec.position, Randomised))
    return masters


def repeat(step: Callable[[], None], times: int, *, record: bool) -> None:
    """Run `step` so often; recorded once and replayed on the GPU, where small kernels wait for the host otherwise. Steps
    that draw random permutations can't be recorded."""
    if not record:
        for _ in range(times):
            step()
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(min(3, times)):
            step()
    torch.cuda.current_stream().wait_stream(side)
    if times <= 3:
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, and runs nothing
        step()
    for _ in range(times - 3):
        graph.replay()


@torch.no_grad()
def score(module: torch.nn.Module, text: Tensor, setting: Setting, length: int) -> float:
    """Bits a character over the last `trained` characters of every window of `length`, in fp32."""
    longest, scored = max(setting.lengths), setting.trained
    ends = torch.linspace(longest, len(text) - 1, setting.windows, dtype=torch.float64).long()
    total, rows = 0.0, max(1, 2**15 // length)
    for chunk in ends.split(rows):
        places = (chunk[:, None] + torch.arange(-length, 1)).to(text.device)
        window = text[places].long()
        hidden = module(window[:, :-1], output="hidden")[:, -scored:]
        total += F.cross_entropy(
            module.head(hidden).flatten(0, 1), window[:, -scored:].flatten(), reduction="sum"
        ).item()
    return total / (setting.windows * scored) / math.log(2)


def measure(name: str, seed: int, setting: Setting, folder: str, device: str, compiled: bool) -> dict[int, float]:
    """Bits a character of one method and seed by length. The text lies in the folder."""
    if device == "cpu":  # small products only wait for each other
        torch.set_num_threads(1 if setting.width < 128 else os.cpu_count() or 1)
    torch.set_float32_matmul_precision("high")
    began = time.monotonic()
    kept, held = (torch.from_numpy(np.load(f"{folder}/{side}.npy")).to(device) for side in ("kept", "held"))
    spec = model_spec(setting, name)
    weights = train(spec, setting, kept, seed, compiled=compiled)
    module = build_model(spec, device=device, seed=None).eval()
    module.load_state_dict(weights)
    bits = {length: score(module, held, setting, length) for length in setting.lengths}
    shown = ", ".join(f"{length}: {found:.3f}" for length, found in bits.items())
    print(f"{name}, seed {seed}: {shown} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return bits


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), error)

    def no_worse(self, other: Spread) -> bool:
        """Lower, or higher by no more than one standard error of the difference."""
        return self.mean <= other.mean + math.hypot(self.error, other.error)


def claims(at: dict[str, Spread]) -> dict[str, bool]:
    """What the papers say of the judged length, and whether it is so here."""
    rope, sinusoidal = at["RoPE"], at["sinusoidal"]
    far = [
        s.mean + max(0.2, 5 * math.hypot(s.error, rope.error))
        for s in (at["KERPLE log"], at["KERPLE power"], at["ALiBi"])
    ]
    return {
        "KERPLE log ≤ KERPLE power": at["KERPLE log"].no_worse(at["KERPLE power"]),
        "KERPLE power ≤ ALiBi": at["KERPLE power"].no_worse(at["ALiBi"]),
        "all three at least 0.2 bits and five standard errors below RoPE": rope.mean > max(far),
        "sinusoidal worst of all that mark positions": all(
            s.mean <= sinusoidal.mean for name, s in at.items() if name != "none"
        ),
    }


COLOURS = ("#0b6e4f", "#2a9d8f", "#1d4ed8", "#7c3aed", "#b45309", "#64748b", "#db2777", "#dc2626", "#111827", "#c026d3")
STYLE = """text{font:12px system-ui,sans-serif;fill:#334155}.grid{stroke:#e2e8f0}.axis{stroke:#64748b}
.curve{fill:none;stroke-width:2}.level{stroke:#94a3b8;stroke-dasharray:4 3}text.level{stroke:none}"""


def picture(found: dict[str, dict[int, Spread]], setting: Setting) -> str:
    """The figure as one SVG file: bits a character over length, both axes as they are read (length in doublings)."""
    names = sorted(found, key=lambda name: found[name][setting.judged].mean)
    series = [
        Series(name, [(math.log2(n), s.mean) for n, s in found[name].items()], tone=f"m{i}", dots=True)
        for i, name in enumerate(names)
    ]
    chart = Chart(
        "Bits a character on held-out text",
        f"log₂ of the length read (trained at {setting.trained})",
        "bits a character",
        series,
        width=720,
        height=420,
    )
    colours = "".join(
        f".m{i}{{stroke:{c}}}circle.m{i},text.m{i}{{fill:{c};stroke:none}}" for i, c in enumerate(COLOURS)
    )
    legend = "".join(
        f'<text class="m{i}" x="{LEFT + 16}" y="{34 + 17 * i}">{name} {found[name][setting.judged].mean:.2f}</text>'
        for i, name in enumerate(names)
    )
    drawn = draw(chart).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, _, rest = drawn.partition(">")
    return f'{head}><style>{STYLE}{colours}</style><rect width="100%" height="100%" fill="#fff"/>{rest}'.replace(
        "</svg>", f"{legend}</svg>"
    )


def report(results: list[dict], setting: Setting, out: Path, facts: dict) -> bool:
    """Print and write what was found; returns whether the order is as published."""
    order = list(methods(setting))
    found = {r["method"]: {n: Spread.of(b) for n, b in r["bits"].items()} for r in results}
    found = {name: found[name] for name in order if name in found}
    print("| Positions | " + " | ".join(f"{n:,}" for n in setting.lengths) + " |\n|-|" + "-|" * len(setting.lengths))
    for name, row in sorted(found.items(), key=lambda item: item[1][setting.judged].mean):
        print(f"| {name} | " + " | ".join(f"{s.mean:.3f} ± {s.error:.3f}" for s in row.values()) + " |")
    judged = {name: row[setting.judged] for name, row in found.items()}
    verdicts = claims(judged) if {"KERPLE log", "KERPLE power", "ALiBi", "RoPE", "sinusoidal"} <= set(judged) else {}
    for claim, holds in verdicts.items():
        print(f"at {setting.judged:,}: {claim}: {'yes' if holds else 'NO'}")
    record = {"setting": asdict(setting), "results": results, "claims": verdicts, **facts}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1))
    out.with_suffix(".svg").write_text(picture(found, setting))
    return all(verdicts.values())


def own_gpu(gpus: int) -> tuple:
    """How worker processes begin: each with one of the GPUs, in turn, for its own."""
    context = multiprocessing.get_context("spawn")
    return context, _take_gpu, (context.Value("i", 0), visible(gpus))


def _take_gpu(taken, gpus: list[str]) -> None:
    with taken.get_lock():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[taken.value % len(gpus)]
        taken.value += 1


def main() -> None:
    """Measure all methods, several at once on a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="a text file or a folder of them; none: the Python sources of this machine"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("length_extrapolation"), help="where .json and .svg go")
    parser.add_argument("--quick", action="store_true", help="tiny models, one seed")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--jobs", type=int, help="models trained at once; none: 5 on each GPU, 1 on a CPU")
    parser.add_argument("--gpus", type=int, default=1, help="over which models are spread")
    parser.add_argument("--only", nargs="+", default=[""], help="methods of these names, or whose names hold these")
    for name in (
        "width",
        "layers",
        "heads",
        "trained",
        "judged",
        "batch",
        "steps",
        "warmup",
        "faster",
        "seeds",
        "windows",
    ):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--lengths", type=lambda text: tuple(int(n) for n in text.split(",")))
    args = parser.parse_args()
    given = {k: v for k, v in vars(args).items() if k in Setting.__dataclass_fields__ and v is not None}
    setting = Setting(**{**asdict(QUICK if args.quick else Setting()), **given})
    cuda = args.device == "cuda"
    known = methods(setting)
    names = [n for n in known if n in args.only or any(part in n for part in args.only if part not in known)]
    jobs = args.jobs or (5 * args.gpus if cuda else 1)
    began = time.monotonic()
    kept, held = read_text(args.data)
    print(f"text read after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs, *own_gpu(args.gpus)) as pool:
        np.save(f"{folder}/kept.npy", kept)
        np.save(f"{folder}/held.npy", held)
        work = {
            (name, seed): pool.submit(measure, name, seed, setting, folder, args.device, cuda and not args.eager)
            for seed in range(setting.seeds)
            for name in names
        }
        results = [
            {
                "method": name,
                "bits": {
                    length: [work[name, seed].result()[length] for seed in range(setting.seeds)]
                    for length in setting.lengths
                },
            }
            for name in names
        ]
    facts = {
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began, 1),
        "jobs": jobs,
        "trained_characters": len(kept),
        "heldout_characters": len(held),
        "text_sha256": hashlib.sha256(kept.tobytes() + held.tobytes()).hexdigest(),
    }
    met = report(results, setting, args.out, facts)
    print(f"{facts['seconds']} s on {facts['device']}")
    raise SystemExit(not met and not args.quick)


if __name__ == "__main__":
    main()
