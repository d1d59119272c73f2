"""The stages of the demo as data: each is a `luban` command and the artifact it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One verb of the demo."""

    name: str  # what people call it
    about: str  # one line for the newcomer
    command: tuple[str, ...]  # the words after `luban`
    out: Path  # the artifact it leaves


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How big the demo's model is, and how long it may train."""

    pretrain: str  # recipe of the pretraining run
    sft: str  # recipe of the instruction tuning
    vocabulary: int  # tokens
    pretrain_seconds: int  # pretraining, compilation included
    sft_seconds: int  # tuning, likewise
    precision: str  # arithmetic of the evaluations


# The demo may take 480 seconds. The stages without a budget take 63 on two quiet cores, so that a machine half of which is
# busy stays below.
CPU = Sizes(
    pretrain="luban_pretrain_cpu",
    sft="luban_sft_cpu",
    vocabulary=4096,
    pretrain_seconds=240,
    sft_seconds=100,
    precision="bfloat16",
)
GPU = Sizes(
    pretrain="luban_pretrain_gpu",
    sft="luban_sft_gpu",
    vocabulary=4096,
    pretrain_seconds=75,
    sft_seconds=60,
    precision="bfloat16",
)


def life(out: Path, sizes: Sizes, seed: int) -> list[Stage]:
    """The stages in order, everything below `out`."""
    at = {
        name: out / name
        for name in (
            "corpus",
            "questions",
            "tokenizer",
            "shards",
            "chat-shards",
            "pretrain",
            "eval-pretrain",
            "sft",
            "eval-sft",
        )
    }

    def stage(name: str, about: str, *command: object) -> Stage:
        return Stage(name, about, (*map(str, command), "--out", str(at[name])), at[name])

    return [
        stage(
            "corpus",
            "the standard library's sources and docstrings, deduplicated, some held out",
            "corpus",
            "build",
            "python:stdlib",
            "--seed",
            seed,
        ),
        stage(
            "questions",
            "questions and answers made from the docstrings, the same objects held out",
            "corpus",
            "build",
            "python:questions",
            "--seed",
            seed,
        ),
        stage(
            "tokenizer",
            "a byte-level BPE vocabulary",
            "tokenizer",
            "train",
            at["corpus"],
            at["questions"],
            "--algorithm",
            "bpe",
            "--vocab-size",
            sizes.vocabulary,
        ),
        stage(
            "shards",
            "tokens in memory-mapped files, document boundaries kept",
            "data",
            "pack",
            at["corpus"],
            "--tokenizer",
            at["tokenizer"],
        ),
        stage(
            "chat-shards",
            "conversations with their loss masks",
            "data",
            "pack",
            at["questions"],
            "--tokenizer",
            at["tokenizer"],
        ),
        stage(
            "pretrain",
            "a decoder learns the text",
            "pretrain",
            sizes.pretrain,
            "--data.path",
            at["shards"],
            "--train.seed",
            seed,
            "--train.budget_seconds",
            sizes.pretrain_seconds,
        ),
        stage(
            "eval-pretrain",
            "held-out bits per byte beside gzip and xz, and the answers' loss before tuning",
            "eval",
            at["pretrain"],
            "bits_per_byte",
            "answer_loss",
            "--corpus",
            at["corpus"],
            at["questions"],
            "--precision",
            sizes.precision,
        ),
        stage(
            "sft",
            "the model learns to answer",
            "sft",
            sizes.sft,
            "--data.path",
            at["chat-shards"],
            "--init",
            at["pretrain"],
            "--train.seed",
            seed,
            "--train.budget_seconds",
            sizes.sft_seconds,
        ),
        stage(
            "eval-sft",
            "answers to held-out questions",
            "eval",
            at["sft"],
            "answer_loss",
            "which_module",
            "samples",
            "--corpus",
            at["questions"],
            "--precision",
            sizes.precision,
        ),
    ]
