"""Prompts and prefixes beside full tuning at three sizes of model: does the gap close as models grow, do deep prompts help?

    python benchmarks/tuning_sizes.py --text FILE|DIR … --data e2e-valid.txt --out DIR [--jobs 3] [--toy]

Decoders of 5M, 20M and 81M parameters are pretrained for equally many steps on the same English text (--text: .txt, .md, .rst or
.jsonl with "text", files or folders of them), then tuned to put restaurants' attributes into sentences (E2E NLG, Novikova et al.
2017, lines `meaning || sentence`), for equally many steps: all weights, a shallow prompt (Lester et al. 2021), a prefix
made by a network (Li & Liang 2021), and keys and values of every layer as parameters, which is P-tuning v2 (Liu et al. 2022), or
prefix tuning without its network. Prompts and prefixes have 20 tokens. Every method is tried at two rates; the one with the lower
loss on 60 meanings is measured on 120 others by BLEU over all wordings (sacrebleu, greedy).

Prints a row a cell as it ends, then tables of BLEU and of that loss: the gap to full tuning by size, deep less shallow, with less
without the network. Every size has a process of its own, --jobs of them at once; what is in OUT isn't computed again. --toy tries
everything on a CPU in a minute or two; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from toy_runs import ToyRuns, exchange

import luban
from luban.adapters.base import adapters_of
from luban.core.metrics.translation import corpus_score
from luban.data.pack import pack
from luban.tokenizer.train import train_tokenizer

SIZES = {  # width, layers, heads, inner width, rate of pretraining
    "5m": (256, 5, 4, 768, 2e-3),
    "20m": (512, 6, 8, 1408, 1e-3),
    "81m": (768, 11, 12, 2048, 6e-4),
}
TOY = {"5m": (32, 1, 2, 48, 2e-3), "20m": (48, 1, 2, 64, 2e-3), "81m": (48, 2, 2, 96, 2e-3)}
LENGTH = 20  # tokens of prompts and prefixes
METHODS: dict[str, tuple[list[str], tuple[str, str]]] = {  # arguments of `luban sft`, rates
    "full": ([], ("3e-4", "1e-3")),
    "prompt": (["--adapter.type", "prompt", "--adapter.length", str(LENGTH)], ("1e-2", "1e-1")),
    "prefix": (["--adapter.type", "prefix", "--adapter.length", str(LENGTH)], ("1e-3", "5e-3")),
    "p_tuning_v2": (["--adapter.type", "p_tuning_v2", "--adapter.length", str(LENGTH)], ("5e-3", "3e-2")),
}
CUDA = torch.cuda.is_available()
DEVICE = ("--train.device", "auto", "--train.precision", "bf16" if CUDA else "fp32", "--train.compile", "false")
PRETRAINING = '[optim]\ntype = "adamw"\n\n[schedule]\ntype = "cosine"\nwarmup = 20\nfinal = 0.1\n'
ASKED = "Put this into a sentence: {}"
DOCUMENT, MOST = 3000, 40_000_000  # characters of a document of a longer text, and of all that is read


def texts_of(places: Sequence[Path]) -> Iterator[str]:
    """Documents of files and folders, cut at empty lines."""
    for place in places:
        files = (
            [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.suffix in (".txt", ".md", ".rst"))
        )
        for file in files:
            if ".jsonl" in file.suffixes:
                lines = gzip.open(file, "rt") if file.suffix == ".gz" else file.open()
                yield from (json.loads(line)["text"] for line in lines)
                continue
            document = ""
            for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8", errors="ignore")):
                document += paragraph + "\n\n"
                if len(document) > DOCUMENT:
                    yield document
                    document = ""
            if document.strip():
                yield document


def prepare(args: argparse.Namespace) -> None:
    """Tokenizer, shards of the text, shards of the task and its test items in OUT/data."""
    data, rng = args.out / "data", random.Random(0)
    texts, size = list(dict.fromkeys(texts_of(args.text))), 0
    rng.shuffle(texts)
    for last, text in enumerate(texts):
        if (size := size + len(text)) > MOST:
            del texts[last:]
            break
    documents = [SimpleNamespace(id=str(i), text=t, messages=None, tools=None) for i, t in enumerate(texts)]
    held = max(1, len(documents) // 50)
    train_tokenizer((d.text for d in documents), data / "tokenizer", vocab_size=600 if args.toy else 4096)
    figures = pack({"train": documents[held:], "heldout": documents[:held]}, data / "tokenizer", data / "text")
    wordings: dict[str, list[str]] = {}
    for line in args.data.read_text().splitlines():
        meaning, _, wording = line.partition("||")
        wordings.setdefault(meaning.strip(), []).append(wording.strip())
    meanings = sorted(wordings)
    rng.shuffle(meanings)
    test, dev, train = meanings[:120], meanings[120:180], meanings[180:]
    splits = {
        split: [
            SimpleNamespace(id=f"{m} {i}", text="", tools=None, **exchange(ASKED.format(m), text))
            for m in chosen
            for i, text in enumerate(wordings[m])
        ]
        for split, chosen in (("train", train), ("heldout", dev))
    }
    rng.shuffle(splits["train"])
    pack(splits, data / "tokenizer", data / "task")
    items = [{"question": ASKED.format(m), "wordings": wordings[m]} for m in test[: 4 if args.toy else None]]
    (data / "test.json").write_text(json.dumps(items))
    print(f"text: {figures['train']['tokens']:,} tokens; task: {len(splits['train'])} sentences", flush=True)


def pretrain(args: argparse.Namespace, size: str, runs: ToyRuns) -> Path:
    """The model of a size."""
    width, layers, heads, inner, rate = (TOY if args.toy else SIZES)[size]
    recipe = runs.folder / "pretrain.toml"
    recipe.write_text(PRETRAINING)
    fields = {"width": width, "layers": layers, "context": 512, "tied_head": "true"}
    fields |= {"layer.mixer.heads": heads, "layer.mixer.kv_heads": heads, "layer.feedforward.width": inner}
    words: list[object] = [part for field, value in fields.items() for part in (f"--model.{field}", value)]
    words += ["--data.path", args.out / "data" / "text", "--train.steps", 8 if args.toy else args.pretrain_steps]
    words += ["--train.batch_size", 4 if args.toy else 64, "--train.seq_len", 64 if args.toy else 256]
    words += [
        "--optim.lr",
        rate,
        "--validation.every",
        0,
        "--checkpoint.every",
        10**6,
        "--train.log_every",
        10,
        *DEVICE,
    ]
    runs.luban("pretrain", recipe, "--out", runs.folder / "base", *words)
    return runs.folder / "base"


def held_out_loss(run: Path) -> float:
    """Nats a target token on the held-out split, after the last step."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["heldout_loss"] for row in rows if "heldout_loss" in row][-1]


def tune(args: argparse.Namespace, method: str, rate: str, base: Path, runs: ToyRuns) -> Path:
    """A tuned run."""
    out = runs.folder / f"{method}-{rate}"
    words: list[object] = ["--data.path", args.out / "data" / "task", "--optim.lr", rate, *METHODS[method][0], *DEVICE]
    words += ["--train.steps", 4 if args.toy else args.steps, "--train.batch_size", 4 if args.toy else 32]
    words += ["--train.seq_len", 256, "--train.seed", args.seed, "--validation.every", 0, "--validation.batches", 0]
    words += ["--validation.patience", 0]
    words += ["--checkpoint.every", 10**6, "--init", base, "--out", out]
    runs.luban("sft", "luban_sft_gpu", *words)
    return out


def measure(args: argparse.Namespace, run: Path) -> dict[str, Any]:
    """BLEU on the test items, and parameters of the adapter, all of the model where there is none."""
    items = json.loads((args.out / "data" / "test.json").read_text())
    model = luban.load_model(run, "cuda" if CUDA else "cpu", "bfloat16" if CUDA else "float32")
    held = [adapter for _, adapter in adapters_of(model.module)] or [model.module]
    engine = luban.Engine(model, max_batch=len(items))
    asked = [[{"role": "user", "content": item["question"]}] for item in items]
    found = engine.generate(asked, luban.Sampling(max_tokens=8 if args.toy else 80, temperature=0))
    answers = [result.text for result in found]
    score, interval, _ = corpus_score("bleu", answers, [item["wordings"] for item in items])
    parameters = sum(p.numel() for part in held for p in part.parameters())
    return {"bleu": score, "interval": interval, "parameters": parameters, "answers": answers[:2]}


def one_size(args: argparse.Namespace, size: str) -> None:
    """All cells of a size, in this process."""
    runs, began = ToyRuns(args.out / size, args.seed), time.perf_counter()
    base = pretrain(args, size, runs)
    losses = held_out_loss(base)
    print(f"{size} pretrained: {losses:.3f} nats a token, {time.perf_counter() - began:.0f} s", flush=True)
    for method, (_, rates) in METHODS.items():
        cell = runs.folder / f"{method}.json"
        if cell.exists():
            continue
        began = time.perf_counter()
        tried = {rate: tune(args, method, rate, base, runs) for rate in rates}
        found = {rate: held_out_loss(run) for rate, run in tried.items()}
        best = min(found, key=found.__getitem__)
        row = {"size": size, "method": method, "rate": best, "loss": found[best], "losses": found}
        row |= measure(args, tried[best])
        cell.write_text(json.dumps(row))
        print(
            f"{size} {method}: BLEU {row['bleu']:.1f}, loss {found[best]:.3f} at {best} of {found}, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
        gc.collect()


def table(args: argparse.Namespace) -> None:
    """What was found, in Markdown."""
    rows: dict[str, dict[str, Any]] = {
        size: {method: json.loads((args.out / size / f"{method}.json").read_text()) for method in METHODS}
        for size in args.sizes
    }
    columns = [*METHODS, "prompt − full", "prefix − full", "v2 − full", "v2 − prompt", "prefix − v2"]
    for figure, digits in (("bleu", 1), ("loss", 3)):
        print(
            f"\n| size | {' | '.join(f'{figure}, {column}' for column in columns)} |\n"
            + "|---" * (len(columns) + 1)
            + "|"
        )
        for size, row in rows.items():
            found = {method: cell[figure] for method, cell in row.items()}
            gaps = [found[method] - found["full"] for method in ("prompt", "prefix", "p_tuning_v2")]
            gaps += [found["p_tuning_v2"] - found["prompt"], found["prefix"] - found["p_tuning_v2"]]
            values = [f"{found[method]:.{digits}f}" for method in METHODS]
            print(f"| {size} | {' | '.join([*values, *(f'{gap:+.{digits}f}' for gap in gaps)])} |")
    kept = {size: {m: {k: v for k, v in c.items() if k != "answers"} for m, c in r.items()} for size, r in rows.items()}
    print(json.dumps(kept))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--pretrain-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=300, help="of tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--alone", choices=SIZES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        one_size(args, args.alone)
        return 0
    if not (args.out / "data" / "test.json").exists():
        prepare(args)

    def start(size: str) -> int:
        return subprocess.run([sys.executable, __file__, *sys.argv[1:], "--alone", size], check=False).returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [size for size, code in zip(args.sizes, pool.map(start, args.sizes), strict=True) if code]
    if failed:
        print(f"failed: {', '.join(failed)}; the same command goes on from what is there")
        return 1
    table(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
