"""A hundred seconds of real training beside transformers' Trainer: the same text, shape, recipe and GPU.

    python benchmarks/real_run.py --out real [--sizes gpt2-124m llama-350m] [--seconds 100] [--gpus 2] [--tiny]

Text: the Python sources and documentation that this machine's own site-packages and standard library hold (*.py, *.md,
*.rst, *.txt), each file once, 2% of them held out by the hash of their text; byte-level BPE of 32,000 trained on a part.
Both sides: AdamW (betas 0.9 and 0.95, decay 0.1), cosine to a tenth after 100 steps of warm-up, clipping at 1, bf16
matmuls over fp32 weights, torch.compile, no dropout, batches of 32 × 1,024 tokens. The number of steps is what each side
does in the given seconds after its tenth step, by the rate of the last 50 steps of a run of 100 before, which flatters Luban
by 3%; compilation is apart. Luban is the command a user calls, with document boundaries; the Trainer reads the same stream
without, as its users do.

Held-out bits per byte: every held-out token but the first of each document, in windows of 1,024, over the held-out bytes.
Both sides of a size run on one GPU, one after another; with --gpus 2 both sizes at once. Writes OUT/results.json, OUT/SIZE.svg and prints a
table; the text that lies in OUT is used again, and `--sizes` without a size only prepares it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from on_gpus import side_by_side

VOCABULARY, SEQ, BATCH, WARM = 32_000, 1024, 32, 10
SIDES = ("luban", "probe", "transformers")  # one after another on one chip; the probe finds the Trainer's rate
HEAT = 1.03  # times a step's time in a short run, in Luban's of a hundred seconds
MOST_BYTES = 250_000_000  # of text: more than either side reads in the time
SIZES: dict[str, dict[str, Any]] = {
    "gpt2-124m": {"lr": 1e-3, "kind": "gpt2", "width": 768, "layers": 12, "heads": 12, "inner": 3072},
    "llama-350m": {"lr": 6e-4, "kind": "llama", "width": 1024, "layers": 24, "heads": 16, "inner": 2816},
}
TINY = {"width": 64, "layers": 2, "heads": 4, "inner": 128}


def prepare(folder: Path, vocabulary: int, most_bytes: int) -> dict[str, int]:
    """Tokenizer and shards of the machine's Python text; their sizes."""
    from luban.data.pack import pack
    from luban.tokenizer.train import train_tokenizer

    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    files = sorted({f for root in roots for end in ("py", "md", "rst", "txt") for f in root.rglob(f"*.{end}")})
    seen, splits, size = set(), {"train": [], "heldout": []}, 0
    order = sorted(files, key=lambda f: hashlib.sha256(str(f).encode()).digest())
    for file in order:
        if size > most_bytes:
            break
        text = file.read_text(encoding="utf-8", errors="ignore") if file.is_file() else ""
        mark = hashlib.sha256(text.encode()).digest()
        if len(text) < 200 or len(text) > 2_000_000 or mark in seen:
            continue
        seen.add(mark)
        size += len(text.encode())
        splits["heldout" if mark[0] < 5 else "train"].append(SimpleNamespace(id=str(file), text=text, messages=None))
    train_tokenizer(
        (d.text for d in splits["train"][: len(splits["train"]) // 4 + 1]), folder / "tokenizer", vocab_size=vocabulary
    )
    figures = pack(splits, folder / "tokenizer", folder / "shards")
    return {
        "files": len(seen),
        "bytes": size,
        "train_tokens": figures["train"]["tokens"],
        "heldout_bytes": figures["heldout"]["bytes"],
        "heldout_tokens": figures["heldout"]["tokens"],
    }


def luban_side(name: str, size: dict[str, Any], folder: Path, seconds: float, tiny: bool) -> dict[str, Any]:
    """`luban pretrain`, twice: to find the rate, then for the given seconds."""
    from luban.core.artifact import open_artifact

    model = {"gpt2": {"preset": "gpt2"}, "llama": {"context": SEQ}}[size["kind"]]
    shape = TINY if tiny else size
    model |= {
        "width": shape["width"],
        "layers": shape["layers"],
        "layer.mixer.heads": shape["heads"],
        "layer.feedforward.width": shape["inner"],
    }
    if size["kind"] == "llama":
        model["layer.mixer.kv_heads"] = shape["heads"]
    if size["kind"] == "gpt2":
        model["context"] = SEQ

    def run(out: Path, steps: int) -> list[dict[str, float]]:
        options = {
            "data.path": folder / "shards",
            "train.steps": steps,
            "train.batch_size": 2 if tiny else BATCH,
            "train.seq_len": 64 if tiny else SEQ,
            "train.precision": "bf16",
            "train.compile": not tiny,
            "train.log_every": WARM,
            "optim.lr": size["lr"],
            "optim.weight_decay": 0.1,
            "schedule.warmup": min(100, steps // 2),
            "schedule.final": 0.1,
            "validation.every": 0,
            "checkpoint.every": 10**6,
            **{f"model.{key}": value for key, value in model.items()},
        }
        recipe = folder / f"{name}.toml"
        recipe.write_text('[optim]\ntype = "adamw"\n[schedule]\ntype = "cosine"\n')
        command = [sys.executable, "-m", "luban", "pretrain", str(recipe), "--out", str(out)]
        for key, value in options.items():
            command += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"luban pretrain failed: {done.stderr[-2000:]}")
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    probe = [row for row in run(folder / f"{name}-probe", 10 * WARM) if "loss" in row]
    each = (probe[-1]["seconds"] - probe[-6]["seconds"]) / (probe[-1]["step"] - probe[-6]["step"]) * HEAT
    rows = run(folder / f"{name}-luban", WARM + max(1, int(seconds / each)))
    losses = [row for row in rows if "loss" in row]
    start = next(row for row in losses if row["step"] >= WARM)
    trained = losses[-1]["seconds"] - start["seconds"]
    figures = open_artifact(folder / f"{name}-luban").figures
    return {
        **{key: value for key, value in figures.items() if isinstance(value, int | float)},
        "bits_per_byte": rows[-1]["bits_per_byte"],
        "steps": losses[-1]["step"],
        "seconds": trained,
        "tokens_per_second": (losses[-1]["tokens"] - start["tokens"]) / trained,
        "curve": [(row["seconds"] - start["seconds"], row["loss"]) for row in losses],
    }


def transformers_side(
    name: str, size: dict[str, Any], folder: Path, seconds: float, tiny: bool, probe: bool = False
) -> dict[str, Any]:
    """transformers.Trainer; a `probe` only finds the rate, in a process of its own: a second Trainer on one model was
    slower than the first, as what it compiled was of no use to it."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from luban.data.shards import Shards

    shape, seq, batch = (TINY, 64, 2) if tiny else (size, SEQ, BATCH)
    train, heldout = Shards.open(folder / "shards", "train"), Shards.open(folder / "shards", "heldout")
    vocabulary = int(train.config["vocab_size"])
    if size["kind"] == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=SEQ,
            n_embd=shape["width"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            n_inner=shape["inner"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
            use_cache=False,
        )
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=shape["width"],
            intermediate_size=shape["inner"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            max_position_embeddings=SEQ,
            attn_implementation="sdpa",
            use_cache=False,
        )
        model = LlamaForCausalLM(config)

    class Windows(torch.utils.data.Dataset):
        def __len__(self):
            return (len(train.data) - 1) // seq

        def __getitem__(self, i: int):
            ids = torch.from_numpy(np.asarray(train.data[i * seq : (i + 1) * seq], dtype=np.int64))
            return {"input_ids": ids, "labels": ids}

    class Clock(TrainerCallback):
        def __init__(self, since: int):
            self.since, self.marks = since, {}

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (self.since, state.max_steps):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.marks[state.global_step] = time.perf_counter()

    def fit(steps: int, since: int = WARM) -> tuple[float, Trainer]:
        arguments = TrainingArguments(
            output_dir=str(folder / f"{name}-trainer"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=size["lr"],
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=min(100, steps // 2),
            bf16=torch.cuda.is_available(),
            torch_compile=not tiny,
            optim="adamw_torch_fused",
            logging_steps=WARM,
            save_strategy="no",
            report_to=[],
            dataloader_num_workers=0 if tiny else 4,
            seed=0,
            disable_tqdm=True,
        )
        clock = Clock(since)
        trainer = Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=[clock])
        trainer.train()
        return clock.marks[steps] - clock.marks[since], trainer

    rate = folder / f"{name}-trainer-rate.json"
    if probe:
        rate.write_text(json.dumps(fit(10 * WARM, since=5 * WARM)[0] / (5 * WARM)))
        return {}
    wanted = WARM + max(1, int(seconds / json.loads(rate.read_text())))
    trained, trainer = fit(wanted)
    curve = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    each = trained / (wanted - WARM)
    return {
        "bits_per_byte": bits_per_byte(trainer.model, heldout, seq, batch),
        "steps": wanted,
        "seconds": trained,
        "tokens_per_second": (wanted - WARM) * batch * seq / trained,
        "curve": [((step - WARM) * each, loss) for step, loss in curve],
    }


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, heldout: Any, seq: int, batch: int) -> float:
    """Every held-out token but the first of each document, in windows."""
    model.eval()
    device = next(model.parameters()).device
    first = np.zeros(len(heldout.data), dtype=bool)
    first[heldout.offsets[:-1]] = True
    total = 0.0
    starts = list(range(0, len(heldout.data) - 1, seq))
    for places in (starts[i : i + batch] for i in range(0, len(starts), batch)):
        for group in [places] if places[-1] + seq < len(heldout.data) else [[place] for place in places]:
            rows = [np.asarray(heldout.data[p : p + seq + 1], dtype=np.int64) for p in group]
            ids = torch.from_numpy(np.stack(rows)).to(device)
            skipped = torch.from_numpy(np.stack([first[p + 1 : p + len(rows[0])] for p in group])).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(input_ids=ids[:, :-1]).logits
            targets = ids[:, 1:].masked_fill(skipped, -100)
            total += torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), reduction="sum"
            ).item()
    return total / math.log(2) / heldout.bytes


def picture(name: str, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss over seconds of both."""
    from luban.report.chart import Chart, Series, draw

    tones = dict(zip(found, ("a", "b"), strict=True))
    series = [
        Series(side, [(at, loss) for at, loss in row["curve"] if at >= 0], tone=tones[side])
        for side, row in found.items()
    ]
    style = (
        "text{font:12px sans-serif;fill:#333}path,line{fill:none;stroke:#bbb}path{stroke-width:1.5}"
        ".a{stroke:#0b6e4f}.b{stroke:#c0392b}text.a{fill:#0b6e4f;stroke:none}text.b{fill:#c0392b;stroke:none}"
    )
    legend = "".join(
        f'<text class="{tones[side]}" x="420" y="{40 + 18 * i}">{side}: {row["bits_per_byte"]:.3f} bits per byte</text>'
        for i, (side, row) in enumerate(found.items())
    )
    drawn = draw(Chart(f"{name}: training loss", "seconds of training", "nats a token", series, clip_start=0.1))
    head, _, rest = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).partition(">")
    path.write_text(
        f'{head}><style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{rest}'.replace(
            "</svg>", f"{legend}</svg>"
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    call = parser.parse_args()
    if call.inside:
        name, side = call.inside
        run = {"luban": luban_side, "probe": partial(transformers_side, probe=True), "transformers": transformers_side}[
            side
        ]
        print("\n" + json.dumps(run(name, SIZES[name], call.out, call.seconds, call.tiny)))
        return
    call.out.mkdir(parents=True, exist_ok=True)
    began, ready = time.perf_counter(), call.out / "text.json"
    if not ready.exists():
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        text = prepare(call.out, 600 if call.tiny else VOCABULARY, 3_000_000 if call.tiny else MOST_BYTES)
        ready.write_text(json.dumps(text))
    text = json.loads(ready.read_text())
    print(f"text {json.dumps(text)}, {time.perf_counter() - began:.0f} s", flush=True)
    results: dict[str, Any] = {"text": text, **{name: {} for name in call.sizes}}
    options = ["--out", call.out, "--seconds", call.seconds, *(["--tiny"] if call.tiny else [])]
    jobs = [
        {f"{name} {side}": [sys.executable, __file__, *options, "--inside", name, side] for side in SIDES}
        for name in call.sizes
    ]
    for job, status, lines in side_by_side(jobs, call.gpus, call.out):
        if status:
            print(f"{job} failed: {' '.join(lines[-6:])[-900:]}", flush=True)
            continue
        name, side = job.split()
        if side == "probe":
            continue
        row = results[name][side] = json.loads(lines[-1])
        print(
            f"{name:12s} {side:13s} {row['bits_per_byte']:.4f} bits per byte after {row['steps']} steps in "
            f"{row['seconds']:.1f} s, {row['tokens_per_second'] / 1e3:.1f}k tokens/s"
            + (f", waiting for data {100 * row['data_wait']:.2f}% of it" if "data_wait" in row else ""),
            flush=True,
        )
        (call.out / "results.json").write_text(json.dumps(results))
        if len(results[name]) == 2:
            picture(name, results[name], call.out / f"{name}.svg")


if __name__ == "__main__":
    main()
