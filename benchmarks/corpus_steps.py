"""MB a CPU second of each corpus step, and of the usual steps together; documents a CPU second beside datatrove.

    python benchmarks/corpus_steps.py --data DIR [--megabytes 20] [--steps c4,gopher,exact,minhash]
    python benchmarks/corpus_steps.py --data DIR --datatrove   # in an environment that has datatrove[processing]

DIR holds text files; they are cut at blank lines into documents of about 4,000 characters and, where they are less
than asked for, used again with their words in another order, so that nothing is a duplicate by construction.
"""

from __future__ import annotations

import argparse
import platform
import random
import tempfile
import time
from pathlib import Path

LENGTH = 4000  # characters of a document


def documents(data: Path, megabytes: float) -> list[str]:
    """Texts of about LENGTH characters, `megabytes` of them in all."""
    texts: list[str] = []
    for path in sorted(data.rglob("*.txt")):
        held = ""
        for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            held += paragraph + "\n"
            if len(held) >= LENGTH:
                texts.append(held)
                held = ""
    rng, found, size = random.Random(0), [], 0
    while size < megabytes * 1e6:
        for text in texts:
            if size >= len(texts) * LENGTH:  # a further round
                sentences = text.split(". ")
                rng.shuffle(sentences)
                words = ". ".join(sentences).split(" ")
                for _ in range(len(words) // 8):
                    i = rng.randrange(len(words))
                    words[i] = words[rng.randrange(len(words))]
                text = " ".join(words)
            found.append(text)
            size += len(text.encode())
            if size >= megabytes * 1e6:
                break
    return found


def luban(texts: list[str], steps: list[str]) -> None:
    """Each step alone over all texts, then all together, each on what the one before left."""
    from luban.corpus.document import Document
    from luban.corpus.steps import make_step
    from luban.corpus.tally import Tally

    whole = [Document(id=str(number), text=text, source="s") for number, text in enumerate(texts)]
    size = sum(d.bytes for d in whole) / 1e6
    for name in steps:
        start = time.process_time()
        left = sum(1 for _ in make_step(name)(whole, Tally()))
        seconds = time.process_time() - start
        print(
            f"{name:<12} {size / seconds:8.1f} MB/s  {len(whole) / seconds:9.0f} documents/s  keeps {left}/{len(whole)}"
        )
    start = time.process_time()
    documents = whole
    for name in steps:
        documents = list(make_step(name)(documents, Tally()))
    seconds = time.process_time() - start
    print(f"{'together':<12} {size / seconds:8.1f} MB/s  {len(whole) / seconds:9.0f} documents/s  "
          f"keeps {len(documents)}/{len(whole)}")  # fmt: skip


def datatrove(texts: list[str]) -> None:
    """MinHash deduplication of datatrove: signatures, buckets, clusters and filter, with its word tokenizer."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

    config = MinhashConfig(num_buckets=14, hashes_per_bucket=8, n_grams=5)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        data = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
        MinhashDedupSignature(f"{folder}/signatures", config=config).run(iter(data), 0, 1)
        for bucket in range(14):
            MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config).run(None, bucket, 14)
        MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config).run(None, 0, 1)
        left = sum(1 for _ in MinhashDedupFilter(f"{folder}/remove").run(iter(data), 0, 1))
        seconds = time.process_time() - start
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{'datatrove minhash':<18} {size / seconds:8.1f} MB/s  {len(texts) / seconds:9.0f} documents/s  "
          f"keeps {left}/{len(texts)}")  # fmt: skip


def main() -> None:
    """Read, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--steps", default="language,c4,gopher,exact,minhash")
    parser.add_argument("--datatrove", action="store_true")
    args = parser.parse_args()
    texts = documents(args.data, args.megabytes)
    print(f"{len(texts)} documents of {args.data} on {platform.processor() or platform.machine()}, one core")
    if args.datatrove:
        datatrove(texts)
    else:
        luban(texts, args.steps.split(","))


if __name__ == "__main__":
    main()
