"""Whether training with fp8 matmuls follows training with bf16 matmuls: the same model, text and order, 500 steps.

    python benchmarks/fp8_curve.py [--steps 500] [--gpus 4] [--tiny] [--out FILE.json]

The 1.1B shape of `gpu_step.py` with heads of 128, batches of 24 × 1,024 tokens of Python sources (those of this Python and
its packages, byte-level BPE of 32,000 trained here; windows in random order, so that no batch is of one file), learning rate
1e-4 after a warm-up of 200 steps: with 3e-4 two runs of one precision were up to 1.9% apart. Losses are averaged over windows
of 50 steps. Each precision runs twice, the second time from weights changed by a thousandth (“again”), which
shows what chance alone does. Printed are the differences from the first bf16 run, and those between the means of both
precisions, relative; the largest of the latter after the first window should be at most 0.5%.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gpu_step import SHAPE, TINY, luban_engine, luban_spec
from on_gpus import side_by_side
from torch import Tensor

from luban.data.batch import Batch
from luban.models.build import build_model, state_of
from luban.models.spec import ModelSpec

WINDOW = 50
BATCH, SEQ, WARMUP, LR = 24, 1024, 200, 1e-4
RUNS = ("bf16", "fp8", "bf16-again", "fp8-again")


def tokens(vocabulary: int, rows: int, length: int) -> np.ndarray:
    """(rows, length) ids of Python sources."""
    wanted, drawn = rows * length, np.random.default_rng(0)
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    files = sorted({f for name in ("stdlib", "purelib") for f in Path(sysconfig.get_path(name)).rglob("*.py")})
    order, texts, size = drawn.permutation(len(files)), [], 0
    for i in order:
        texts.append(files[i].read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
        if size > 5 * wanted:
            break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts[: len(texts) // 4 + 1], trainer)
    ids = np.concatenate([np.array(found.ids, dtype=np.int64) for found in tokenizer.encode_batch(texts)])
    return drawn.permutation(np.resize(ids, (rows, length)))  # resize repeats what is too short


class TextBatch:
    """One batch of a step."""

    cut = Batch.cut

    def __init__(self, rows: np.ndarray, step: int, batch: int):
        self.ids = rows[step * batch : (step + 1) * batch]
        self.target_count = self.tokens_read = batch * (rows.shape[1] - 1)
        self.tokens = self.ids[:, :-1]

    def arrays(self):
        return {"tokens": self.tokens, "targets": self.ids[:, 1:], "loss_mask": self.ids[:, 1:] >= 0}


def disturbed_weights(spec: ModelSpec, device: str) -> dict[str, Tensor]:
    """Those of seed 0, each changed by about a thousandth."""
    torch.manual_seed(1)
    weights = state_of(build_model(spec, device=device, seed=0))
    return {name: weight * (1 + 1e-3 * torch.randn_like(weight)) for name, weight in weights.items()}


def curve(name: str, steps: int, tiny: bool, path: str) -> list[float]:
    """The loss of every step."""
    shape, batch, seq = (TINY, 2, 64) if tiny else (SHAPE, BATCH, SEQ)
    rows = np.load(path)
    spec, device = luban_spec(shape, 4 if tiny else 16, seq), "cuda" if torch.cuda.is_available() else "cpu"
    init = disturbed_weights(spec, device) if name.endswith("-again") else 0
    settings = {"weights": "fp32", "moments": "fp32", "precision": name.split("-")[0]}
    engine = luban_engine(spec, settings, device, lr=LR, init=init)
    in_flight, losses, began = [], [], time.perf_counter()
    for i in range(steps):
        in_flight.append(engine.submit(TextBatch(rows, i, batch), min(1.0, (i + 1) / WARMUP)))
        if len(in_flight) == WINDOW or i + 1 == steps:
            losses += [engine.synchronize(step).loss for step in in_flight]
            in_flight = []
            print(
                f"{name}, step {i + 1}: {np.mean(losses[-WINDOW:]):.4f} after {time.perf_counter() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return losses


def windows(losses: list[float]) -> np.ndarray:
    """Means of whole windows."""
    return np.reshape(losses[: len(losses) // WINDOW * WINDOW], (-1, WINDOW)).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    call = parser.parse_args()
    if call.inside:
        print(json.dumps(curve(call.inside[0], call.steps, call.tiny, call.inside[1])))
        return
    if call.steps < 2 * WINDOW:
        parser.error(f"--steps must be at least {2 * WINDOW}, two windows; {call.steps} given")
    shape, batch, seq = (TINY, 2, 64) if call.tiny else (SHAPE, BATCH, SEQ)
    began, found = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.npy"
        np.save(path, tokens(shape["vocab"], call.steps * batch, seq + 1))
        print(f"text ready after {time.perf_counter() - began:.0f} s", flush=True)
        jobs = [
            {
                name: [
                    sys.executable,
                    __file__,
                    "--steps",
                    call.steps,
                    "--inside",
                    name,
                    path,
                    *(["--tiny"] if call.tiny else []),
                ]
            }
            for name in RUNS
        ]
        logs = call.out.parent if call.out else Path(folder)  # those of a run that is cut off stay
        for name, status, lines in side_by_side(jobs, call.gpus, logs):
            print("\n".join(line for line in lines if ", step " in line) or "\n".join(lines[-20:]), flush=True)
            if status == 0:
                found[name] = json.loads(lines[-1])
            if call.out:
                call.out.write_text(json.dumps(found))
    if missing := set(RUNS) - found.keys():
        raise SystemExit(f"no curve of {', '.join(sorted(missing))}")
    report({name: windows(losses) for name, losses in found.items()})


def report(means: dict[str, np.ndarray]) -> None:
    """A line a window, and what decides."""
    both = {kind: (means[kind] + means[f"{kind}-again"]) / 2 for kind in ("bf16", "fp8")}
    gaps = {name: means[name] / means["bf16"] - 1 for name in RUNS[1:]} | {"means": both["fp8"] / both["bf16"] - 1}
    for i, loss in enumerate(means["bf16"]):
        cells = "".join(f"   {name} {100 * gap[i]:+.2f}%" for name, gap in gaps.items())
        print(f"steps {i * WINDOW + 1:4d} to {(i + 1) * WINDOW:4d}   bf16 {loss:.4f}{cells}")
    for name, gap in gaps.items():
        print(
            f"{name}: largest after the first window {100 * np.abs(gap[1:]).max():.2f}%, "
            f"mean {100 * gap[1:].mean():+.2f}%"
        )
    print("at most 0.5% is wanted of the means")


if __name__ == "__main__":
    main()
