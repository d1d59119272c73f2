"""Encoding speed beside the library's own batch call, and packing's.

    python benchmarks/tokenizer_encode.py --data DIR [--megabytes 32] [--tokenizer DIR] [--algorithm bpe] [--rounds 5]

DIR holds text files (.txt, .md, .py), cut into documents of about 4,000 characters. Without --tokenizer a vocabulary of
8,192 is learned from them. The calls take turns; of each the median of all rounds is printed, its ratio to the library's, and the same of CPU seconds, for a busy machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
from corpus_steps import documents

from luban.corpus.document import Document
from luban.data.pack import pack
from luban.tokenizer.tokenizer import FILE, load_tokenizer
from luban.tokenizer.train import train_tokenizer


def library(path: Path) -> Callable[[list[str]], int]:
    """The library alone: read the vocabulary, encode a batch, take the ids."""
    model = tokenizers.Tokenizer.from_file(str(path / FILE))
    model.encode_special_tokens = True
    return lambda texts: sum(len(e.ids) for e in model.encode_batch_fast(texts, add_special_tokens=False))


def ours(path: Path) -> Callable[[list[str]], int]:
    """`Tokenizer.encode_batch`."""
    model = load_tokenizer(path)
    return lambda texts: sum(map(len, model.encode_batch(texts)))


def packing(path: Path, out: Path) -> Callable[[list[str]], int]:
    """`luban data pack` from documents in memory to verified shards on disk, without reading a corpus."""
    number = iter(range(1 << 30))

    def run(texts: list[str]) -> int:
        held = [Document(id=str(i), text=text, source="s") for i, text in enumerate(texts)]
        return pack({"train": held}, path, out / str(next(number)))["train"]["tokens"] - 2 * len(texts)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=32)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--algorithm", default="bpe")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    texts = documents(args.data, args.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = args.tokenizer or Path(folder) / "tok"
        if args.tokenizer is None:
            train_tokenizer(texts, path, algorithm=args.algorithm, vocab_size=8192)
        calls = {"library": library(path), "encode_batch": ours(path), "data pack": packing(path, Path(folder))}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        work: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds):
            counts = set()
            for name, call in calls.items():
                start, busy = time.perf_counter(), time.process_time()
                counts.add(call(texts))
                seconds[name].append(time.perf_counter() - start)
                work[name].append(time.process_time() - busy)
            assert len(counts) == 1, counts  # all make the same tokens
    print(f"{len(texts)} documents, {size:.1f} MB, tokenizers {tokenizers.__version__}, {os.cpu_count()} cores")
    base, base_work = (statistics.median(kind["library"]) for kind in (seconds, work))
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(
            f"{name:<14} {size / middle:7.1f} MB/s  {base / middle:6.1%} of the library  "
            f"spread {min(found):.2f}–{max(found):.2f} s  CPU {base_work / statistics.median(work[name]):6.1%}"
        )


if __name__ == "__main__":
    main()
