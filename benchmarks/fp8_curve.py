"""Whether training with fp8 products follows training with bf16 products: the same model, text and order, 500 steps.

    python benchmarks/fp8_curve.py [--steps 500] [--gpus 1] [--tiny] [--out FILE.json]

The 1.1B shape of `gpu_step.py` with heads of 128, batches of 24 × 1,024 tokens of Python sources (those of this Python and
its packages, byte-level BPE of 32,000 trained here). Losses are averaged over windows of 50 steps; the two curves'
relative difference is printed for every window, and the largest one after the first window decides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gpu_step import SHAPE, TINY, luban_trainer
from on_gpus import visible

WINDOW = 50
BATCH, SEQ = 24, 1024


def tokens(vocabulary: int, wanted: int) -> np.ndarray:
    """Ids of Python sources, at least `wanted` of them, shuffled by file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    files = sorted({f for name in ("stdlib", "purelib") for f in Path(sysconfig.get_path(name)).rglob("*.py")})
    order, texts, size = np.random.default_rng(0).permutation(len(files)), [], 0
    for i in order:
        texts.append(files[i].read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
        if size > 5 * wanted:
            break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(texts[: len(texts) // 4 + 1], trainer)
    ids = np.concatenate([np.array(found.ids, dtype=np.int64) for found in tokenizer.encode_batch(texts)])
    return ids[:wanted] if len(ids) >= wanted else np.resize(ids, wanted)


class TextBatch:
    """One batch of consecutive windows."""

    def __init__(self, ids: np.ndarray, step: int, batch: int, seq: int):
        rows = [(step * batch + row) * (seq + 1) for row in range(batch)]
        self.ids = np.stack([ids[at : at + seq + 1] for at in rows])
        self.tokens_trained = self.tokens_read = batch * seq

    def arrays(self):
        return self.ids[:, :-1], self.ids[:, 1:], self.ids[:, 1:] >= 0


def curve(precision: str, steps: int, tiny: bool, path: str) -> list[float]:
    """The loss of every step."""
    shape, batch, seq = (TINY, 2, 64) if tiny else (SHAPE, BATCH, SEQ)
    ids = np.load(path)
    step, _ = luban_trainer(shape, 4 if tiny else 16, batch, seq, "cuda" if torch.cuda.is_available() else "cpu",
                            {"weights": "fp32", "moments": "fp32", "precision": precision}, lr=3e-4)  # fmt: skip
    launched, losses, began = [], [], time.perf_counter()
    for i in range(steps):
        factor = min(1.0, (i + 1) / 50)
        launched.append(step.launch(TextBatch(ids, i, batch, seq), factor))
        if len(launched) == WINDOW or i + 1 == steps:
            losses += [step.settle(each).loss for each in launched]
            launched = []
            print(f"{precision}, step {i + 1}: {np.mean(losses[-WINDOW:]):.4f} after {time.perf_counter() - began:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
    return losses


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
    shape, batch, seq = (TINY, 2, 64) if call.tiny else (SHAPE, BATCH, SEQ)
    began, found, running = time.perf_counter(), {}, {}
    devices = visible(call.gpus)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/ids.npy"
        np.save(path, tokens(shape["vocab"], call.steps * batch * (seq + 1)))
        print(f"text ready after {time.perf_counter() - began:.0f} s", flush=True)
        for i, precision in enumerate(("bf16", "fp8")):
            command = [sys.executable, __file__, "--steps", str(call.steps), "--inside", precision, path,
                       *(["--tiny"] if call.tiny else [])]  # fmt: skip
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices[i % len(devices)]}
            running[precision] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            if call.gpus == 1:
                running[precision].wait()
        for precision, process in running.items():
            found[precision] = json.loads(process.communicate()[0].strip().splitlines()[-1])
    windows = [np.reshape(found[p][: len(found[p]) // WINDOW * WINDOW], (-1, WINDOW)).mean(1) for p in ("bf16", "fp8")]
    gaps = windows[1] / windows[0] - 1
    for i, (a, b, gap) in enumerate(zip(*windows, gaps, strict=True)):
        print(f"steps {i * WINDOW + 1:4d} to {(i + 1) * WINDOW:4d}   bf16 {a:.4f}   fp8 {b:.4f}   {100 * gap:+.2f}%")
    print(f"largest after the first window: {100 * np.abs(gaps[1:]).max():.2f}% (wanted: 0.5%)")
    if call.out:
        call.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
