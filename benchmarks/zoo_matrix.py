"""Every family of the zoo trained with its own objective through `luban pretrain`, at tiny widths.

    python benchmarks/zoo_matrix.py --data DIR [--steps 300] [--only bert]

DIR holds text files. The corpus, a tokenizer of characters and shards are made from them as a user would. For every
family a recipe is written and `luban pretrain` run; the table gives the loss at the first step and the mean of the
last tenth, in nats a target, beside the entropy that it must come below: the bigram entropy of the tokens for causal
models, the unigram entropy for the others. A row that also says whether two segments belong together has two parts in its
loss; they are measured apart after training, on masks and pairs drawn anew, and that of the hidden tokens must come below.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luban.cli.main import main as main_of_luban
from luban.core.config import from_dict, to_toml
from luban.data.shards import Shards
from luban.load.model import load_model
from luban.objectives.base import Objective
from luban.objectives.masked import Masked
from luban.parallel.engine import to_device

MIXER = {"type": "grouped", "heads": 4, "qkv_bias": True, "output_bias": True}
POST = {
    "arrangement": "post",
    "norm": "layernorm",
    "mixer": MIXER,
    "feedforward": {"type": "gelu", "width": 256, "bias": True},
}
ENCODER = {"embedding_norm": {"type": "layernorm"}, "position": "learned", "layer": POST}
GPT_LAYER = {"norm": "layernorm", "mixer": MIXER, "feedforward": {"type": "gelu_tanh", "width": 256, "bias": True}}
GPT = {"position": "learned", "tied_head": True, "layer": GPT_LAYER}
LLAMA = {"layer": {"mixer": {"heads": 4, "kv_heads": 4}, "feedforward": {"width": 192}}}
GROUPED = {"heads": 4, "kv_heads": 2}
FALCON = {
    "layer": {
        "norm": "layernorm",
        "arrangement": "parallel",
        "mixer": {"heads": 4, "kv_heads": 1},
        "feedforward": {"type": "gelu", "width": 256},
    }
}
PAIRS = {"type": "masked_lm", "pair": True}
FAN_IN = {"init": {"type": "fan_in", "embedding": 1.0}}


@dataclass(frozen=True)
class Row:
    """A family at a tiny width, and its objective."""

    name: str
    model: dict[str, Any]
    objective: dict[str, Any] = field(default_factory=lambda: {"type": "causal"})
    causal: bool = True  # which entropy it must come below
    longer: int = 1  # times the steps that the others get
    lr: float = 3e-3  # peak; post-norm models need a lower one


ROWS = (
    Row("GPT-1, causal", GPT | {"layer": GPT_LAYER | {"arrangement": "post"}}, lr=1e-3, longer=4),
    Row("GPT-2, causal", GPT),
    Row("GPT-3, causal", GPT | {"pattern": [{"every": 2, "offset": 1, "mixer": {"window": 32}}]}),
    Row("LLaMA, causal", LLAMA),
    Row("Llama 2, causal", LLAMA | {"layer": LLAMA["layer"] | {"mixer": GROUPED}}),
    Row("Falcon, causal", FALCON),
    Row("BLOOM, causal", GPT | {"position": "alibi", "embedding_norm": {"type": "layernorm"}}),
    Row(
        "ChatGLM2, causal",
        LLAMA
        | {
            "position": {"type": "rope", "width": 8, "pairing": "interleaved"},
            "layer": LLAMA["layer"] | {"mixer": GROUPED | {"qkv_bias": True}},
        },
    ),
    Row("KERPLE, causal", LLAMA | {"position": "kerple_log"}),
    Row("xPos, causal", LLAMA | {"position": "xpos"}),
    Row("RNN, causal", {"body": {"type": "recurrent", "cell": "rnn"}, **FAN_IN}),
    Row("LSTM, causal", {"body": {"type": "recurrent", "cell": "lstm"}, **FAN_IN}, lr=1e-2),
    Row(
        "ELMo, bidirectional",
        {"body": {"type": "elmo", "cell": {"type": "lstm", "cells": 128}}, **FAN_IN},
        {"type": "bidirectional"},
    ),
    Row(
        "ELMo of characters, bidirectional",
        {
            "body": {
                "type": "elmo",
                "cell": {"type": "lstm", "cells": 128},
                "words": {"filters": [16, 16, 32, 32], "highways": 1},
            },
            **FAN_IN,
        },
        {"type": "bidirectional", "characters": 12},
        lr=6e-3,
    ),
    Row(
        "BERT, masked + next sentence",
        ENCODER | {"body": {"type": "encoder", "segments": 2}, "head": PAIRS, "tied_head": True},
        {"type": "masked", "copies": 10, "pairing": "next_sentence"},
        False,
        lr=1e-3,
    ),
    Row(
        "BERT, whole words",
        ENCODER | {"body": "encoder", "head": "masked_lm", "tied_head": True},
        {"type": "masked", "selection": "words"},
        False,
        lr=1e-3,
    ),
    Row(
        "RoBERTa, dynamic masks",
        ENCODER | {"body": {"type": "encoder", "segments": 1}, "head": "masked_lm", "tied_head": True},
        {"type": "masked"},
        False,
        lr=1e-3,
    ),
    Row(
        "ALBERT, n-grams + order",
        ENCODER
        | {
            "body": {"type": "encoder", "segments": 2, "embeddings": 32},
            "pattern": [{"at": [1], "share": 0}],
            "head": PAIRS,
            "tied_head": True,
        },
        {"type": "masked", "selection": "ngrams", "pairing": "sentence_order"},
        False,
        lr=1e-3,
    ),
    Row("Prefix LM", LLAMA, {"type": "prefix"}, False),
    Row("GLM, blank infilling", GPT | {"position": "learned_2d"}, {"type": "blank_infilling"}, False),
    Row(
        "BART, denoising",
        ENCODER | {"body": "encoder_decoder", "head": {"type": "language_model", "bias": True}, "tied_head": True},
        {"type": "denoising"},
        False,
        lr=1e-3,
    ),
    Row(
        "Transformer, denoising",
        {
            "body": "encoder_decoder",
            "position": "sinusoidal",
            "tied_head": True,
            "layer": {
                "norm": "layernorm",
                "arrangement": "post",
                "mixer": {"type": "grouped", "heads": 4},
                "feedforward": {"type": "relu", "width": 256, "bias": True},
            },
        },
        {"type": "denoising", "noise": "token_masking"},
        False,
        lr=1e-3,
    ),
    Row(
        "T5, span corruption",
        {
            "body": "encoder_decoder",
            "position": {"type": "t5", "buckets": 16, "max_distance": 64},
            "layer": {
                "mixer": {"type": "grouped", "heads": 4, "score_scale": 1.0, "head_dim": 16},
                "feedforward": {"type": "relu", "width": 256},
            },
            "init": {"type": "fan_in", "embedding": 1.0},
            "head": {"type": "language_model", "scale_hidden": True},
            "tied_head": True,
        },
        {"type": "span_corruption", "sentinels": 16},
        False,
    ),
)


def luban(*arguments: object) -> None:
    """One command as a user gives it. Raises SystemExit where it fails."""
    with redirect_stdout(io.StringIO()):
        failed = main_of_luban([str(argument) for argument in arguments])
    if failed:
        raise SystemExit(f"luban {' '.join(map(str, arguments))} failed")


def entropies(shards: Shards) -> tuple[float, float]:
    """(unigram, bigram) entropy in nats a token: −Σ p(t) ln p(t), and −Σ p(s, t) ln p(t | s) inside documents."""
    tokens = np.asarray(shards.data).astype(np.int64)
    counts = np.bincount(tokens)
    p = counts[counts > 0] / counts.sum()
    inside = np.ones(len(tokens) - 1, dtype=bool)
    inside[shards.offsets[1:-1] - 1] = False
    pairs = (tokens[:-1] * shards.vocab_size + tokens[1:])[inside]
    joint, joint_counts = np.unique(pairs, return_counts=True)
    first = np.bincount(tokens[:-1][inside], minlength=shards.vocab_size)[joint // shards.vocab_size]
    bigram = -(joint_counts / joint_counts.sum() * np.log(joint_counts / first)).sum()
    return float(-(p * np.log(p)).sum()), float(bigram)


@torch.no_grad()
def losses_apart(objective: Masked, run: Path, shards: Path) -> tuple[float, float]:
    """(nats a hidden token, nats a pair) of a trained model on masks and pairs that it wasn't trained on."""
    loss = objective.loss(load_model(run).module)
    examples = objective.examples(Shards.open(shards), seq_len=64, seed=1, packing="stream")
    rows = np.random.default_rng(0).choice(examples.rows, min(examples.rows, 1024), replace=False)
    batches = np.array_split(rows, 16)
    found = [loss(to_device(examples.gather(some), torch.device("cpu"))).metrics for some in batches]
    # Both losses are divided by the hidden tokens: that of pairs is weighted so that this leaves a mean over a batch's pairs.
    tokens, hidden = (
        torch.stack(parts).double() for parts in zip(*(each["token_loss"] for each in found), strict=True)
    )
    pairs, _ = (torch.stack(parts).double() for parts in zip(*(each["pair_loss"] for each in found), strict=True))
    sizes = torch.tensor([len(some) for some in batches])
    return float(tokens.sum() / hidden.sum()), float((pairs / hidden * sizes).sum() / sizes.sum())


def measure(row: Row, shards: Path, out: Path, steps: int) -> tuple[float, float, float]:
    """(first loss, mean loss of the last tenth, seconds) of one run."""
    layers = {} if "cell" in row.model.get("body", ()) else {"layers": 2}  # recurrent bodies have two of their own
    recipe = {
        "model": {"width": 64, "context": 128, **layers, **row.model},
        "objective": row.objective,
        "data": {"path": str(shards)},
        "optim": {"type": "adamw", "lr": row.lr},
        "schedule": {"type": "cosine", "warmup": 20},
        "train": {"steps": steps, "batch_size": 16, "seq_len": 64, "log_every": 1, "device": "cpu"},
        "checkpoint": {"every": steps},
        "validation": {"every": 0, "batches": 4},
    }
    file = out.with_suffix(".toml")
    file.write_text(to_toml(recipe))
    began = time.monotonic()
    luban("pretrain", file, "--out", out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if "loss" in r]
    return losses[0], float(np.mean(losses[-max(steps // 10, 1) :])), time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of text files")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        luban("corpus", "build", args.data, "--out", home / "corpus")
        luban(
            "tokenizer",
            "train",
            home / "corpus",
            "--out",
            home / "tokenizer",
            "--algorithm",
            "char",
            "--vocab-size",
            384,
        )
        luban("data", "pack", home / "corpus", "--tokenizer", home / "tokenizer", "--out", home / "shards")
        unigram, bigram = entropies(Shards.open(home / "shards"))
        print(f"unigram entropy {unigram:.3f}, bigram entropy {bigram:.3f} nats a token\n")
        print(
            "| Family and objective | First loss | Last loss | Must be below | | Seconds |\n|-|-|-|-|-|-|", flush=True
        )
        failed = 0
        for i, row in enumerate(r for r in ROWS if args.only in r.name):
            try:
                first, last, seconds = measure(row, home / "shards", home / f"run{i}", row.longer * args.steps)
            except SystemExit as error:  # the other rows are still worth measuring
                print(f"| {row.name} | {error} |", flush=True)
                failed += 1
                continue
            bound, judged, shown = bigram if row.causal else unigram, last, f"{last:.3f}"
            if "pairing" in row.objective:
                judged, pair = losses_apart(from_dict(Objective, row.objective), home / f"run{i}", home / "shards")
                shown += f" (tokens {judged:.3f}, pairs {pair:.3f})"
            verdict = "yes" if judged < bound else "NO"
            print(f"| {row.name} | {first:.3f} | {shown} | {bound:.3f} | {verdict} | {seconds:.0f} |", flush=True)
            failed += judged >= bound
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
