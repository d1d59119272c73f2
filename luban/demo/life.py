"""The stages of the demo as data: each is a `luban` command and the artifact it leaves."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

WORKERS = 8  # processes that read the installed packages, at the most


@dataclass(frozen=True)
class Stage:
    """One verb of the demo."""

    name: str  # what people call it
    about: str  # one line for the newcomer
    command: tuple[str, ...]  # the words after `luban`
    out: Path  # the artifact it leaves


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How big the demo's model is, what it reads, and how long it may train."""

    pretrain: str  # recipe of the pretraining run
    sft: str  # recipe of the instruction tuning
    vocabulary: int  # tokens
    # also train on the sources of installed packages; a model soon overfits the standard library alone
    packages: bool
    pretrain_seconds: int  # pretraining, compilation included
    sft_seconds: int  # tuning, likewise
    training: str  # train.precision of both runs
    precision: str  # arithmetic of the evaluations
    micro_batches: int = 1  # that a step of pretraining is cut into, to fit into memory; the result is the same


# The demo may take 480 seconds on two CPU cores. The stages without a budget take 63 where both are idle, so that a machine
# half of which is busy stays below. On a GPU it may take 180.
CPU = Sizes(
    pretrain="luban_pretrain_cpu",
    sft="luban_sft_cpu",
    vocabulary=4096,
    packages=False,
    pretrain_seconds=240,
    sft_seconds=100,
    training="bf16",
    precision="bfloat16",
)
GPU = Sizes(
    pretrain="luban_pretrain_gpu",
    sft="luban_sft_gpu",
    vocabulary=8192,
    packages=True,
    pretrain_seconds=45,
    sft_seconds=18,
    training="bf16",
    precision="bfloat16",
)


# bytes that pretraining takes on a GPU: whatever the micro-batch, and of a whole batch; the rest is left to others
FIXED, WHOLE_BATCH, USED = 1.5e9, 12.4e9, 0.95


def on_gpu(free: float) -> Sizes:
    """The demo on a GPU with so many bytes free."""
    fits = (n for n in (1, 2, 4, 8, 16) if FIXED + WHOLE_BATCH / n <= USED * free)
    return replace(GPU, micro_batches=next(fits, 16))


def life(out: Path, sizes: Sizes, seed: int) -> list[Stage]:
    """The stages in order, everything below `out`."""
    text = out / ("text" if sizes.packages else "corpus")
    names = {
        "out": out,
        "text": text,
        "heldout": out / "corpus" / "heldout-00000.parquet",
        "seed": seed,
        "workers": min(os.cpu_count() or 1, WORKERS),
        **vars(sizes),
    }

    def stage(name: str, about: str, line: str) -> Stage:
        """`line` is the command's words; {name} in a word stands for an entry of `names`."""
        words = (word.format(**names) for word in line.split())
        return Stage(name, about, (*words, "--out", str(out / name)), out / name)

    stages = [
        stage(
            "corpus",
            "the standard library's sources and docstrings, deduplicated, some held out",
            "corpus build python:stdlib --seed {seed}",
        ),
        stage(
            "questions",
            "questions and answers made from the docstrings, the same objects held out",
            "corpus build python:questions --seed {seed}",
        ),
    ]
    if sizes.packages:
        stages += [
            stage(
                "packages",
                "the sources of installed packages, without what the held-out documents hold",
                "corpus build python:packages --heldout 0 --seed {seed} --workers {workers} "
                "--steps exact,minhash,contamination={heldout}",
            ),
            stage("text", "both together, a quarter of it the standard library", "corpus mix demo --parts {out}"),
        ]
    return [
        *stages,
        stage(
            "tokenizer",
            "a byte-level BPE vocabulary",
            "tokenizer train {out}/corpus {out}/questions --algorithm bpe --vocab-size {vocabulary}",
        ),
        stage(
            "shards",
            "tokens in memory-mapped files, document boundaries kept",
            "data pack {text} --tokenizer {out}/tokenizer",
        ),
        stage(
            "chat-shards",
            "conversations with their loss masks",
            "data pack {out}/questions --tokenizer {out}/tokenizer",
        ),
        stage(
            "pretrain",
            "a decoder learns the text",
            "pretrain {pretrain} --data.path {out}/shards --train.seed {seed} --train.precision {training} "
            "--train.budget_seconds {pretrain_seconds} --train.accumulate {micro_batches}",
        ),
        stage(
            "eval-pretrain",
            "held-out bits per byte beside gzip and xz, and the answers' loss before tuning",
            "eval {out}/pretrain bits_per_byte answer_loss --corpus {out}/corpus {out}/questions --precision {precision}",
        ),
        stage(
            "sft",
            "the model learns to answer",
            "sft {sft} --data.path {out}/chat-shards --init {out}/pretrain --train.seed {seed} "
            "--train.precision {training} --train.budget_seconds {sft_seconds}",
        ),
        stage(
            "eval-sft",
            "answers to held-out questions",
            "eval {out}/sft answer_loss which_module samples --corpus {out}/questions --precision {precision}",
        ),
        stage(
            "index",
            "the library's documented objects, for search",
            "rag index python:objects --encoder bm25 --passages document",
        ),
        stage(
            "eval-index",
            "the same held-out questions, looked up",
            "rag eval {out}/index {out}/questions --task which_module --k 1 5",
        ),
    ]
