"""MB a CPU second of each corpus step, of the usual steps together and of the n-gram model; documents beside datatrove.

    python benchmarks/corpus_steps.py --data DIR [--megabytes 20] [--steps c4,gopher,exact,minhash] [--rounds 3]
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


def luban(texts: list[str], steps: list[str], rounds: int) -> None:
    """Each step alone over all texts, the best of a few rounds; then all of them."""
    from luban.corpus.document import Document
    from luban.corpus.steps import make_step
    from luban.corpus.tally import Tally

    whole = [Document(id=str(number), text=text, source="s") for number, text in enumerate(texts)]
    size = sum(d.bytes for d in whole) / 1e6
    everything = 0.0
    for name in steps:
        list(make_step(name)(whole[:8], Tally()))  # models and tables are read once a process
        seconds = float("inf")
        for _ in range(rounds):
            start = time.process_time()
            left = sum(1 for _ in make_step(name)(whole, Tally()))
            seconds = min(seconds, time.process_time() - start)
        everything += seconds
        _line(name, size, len(whole), seconds, f"keeps {left}/{len(whole)}")
    _line("all, sum", size, len(whole), everything, "every step over all of the text")
    seconds = float("inf")
    for _ in range(rounds):
        start, documents = time.process_time(), whole
        for name in steps:
            documents = list(make_step(name)(documents, Tally()))
        seconds = min(seconds, time.process_time() - start)
    _line("in a row", size, len(whole), seconds, f"each on what is left; keeps {len(documents)}/{len(whole)}")


def _line(name: str, size: float, documents: int, seconds: float, note: str) -> None:
    print(f"{name:<14} {size / seconds:8.1f} MB/s  {documents / seconds:9.0f} documents/s  {note}")


def ngram(texts: list[str], rounds: int) -> None:
    """The n-gram quality model: trained on one half, the other half scored."""
    from luban.corpus.quality.ngram import NgramModel

    half = len(texts) // 2
    sizes = [sum(len(text.encode()) for text in part) / 1e6 for part in (texts[:half], texts[half:])]
    start = time.process_time()
    model = NgramModel.train(texts[:half])
    _line("n-gram train", sizes[0], half, time.process_time() - start, f"{len(model.grams[-1].keys)} 3-grams")
    seconds = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for text in texts[half:]:
            model.perplexity(text)
        seconds = min(seconds, time.process_time() - start)
    _line("n-gram score", sizes[1], len(texts) - half, seconds, "")


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
    print(
        f"{'datatrove minhash':<18} {size / seconds:8.1f} MB/s  {len(texts) / seconds:9.0f} documents/s  "
        f"keeps {left}/{len(texts)}"
    )


def main() -> None:
    """Read, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--steps", default="unicode,normalise,language,c4,gopher,exact,minhash")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--datatrove", action="store_true")
    args = parser.parse_args()
    texts = documents(args.data, args.megabytes)
    print(f"{len(texts)} documents of {args.data} on {platform.processor() or platform.machine()}, one core")
    if args.datatrove:
        datatrove(texts)
    else:
        luban(texts, args.steps.split(","), args.rounds)
        ngram(texts, args.rounds)


if __name__ == "__main__":
    main()
