"""The whole life through the command line, on a little text: every verb feeds the next, and lineage holds."""

import json
import os
import random
import subprocess
import sys

import pytest

WORDS = [
    "stone",
    "river",
    "bridge",
    "timber",
    "square",
    "chisel",
    "plane",
    "saw",
    "ink",
    "line",
    "beam",
    "roof",
    "gate",
    "tower",
    "wheel",
    "lock",
]


def luban(*words, cwd, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "luban", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, f"luban {' '.join(map(str, words))}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """A folder in which the whole life has been lived."""
    root = tmp_path_factory.mktemp("life")
    (root / "text").mkdir()
    for index in range(120):
        body = " ".join(random.choices(WORDS, k=random.randint(40, 200)))
        (root / "text" / f"{index:03d}.txt").write_text(f"Chapter {index}. {body}.\n")
    pairs = [
        {
            "id": f"q{i}",
            "messages": [
                {"role": "user", "content": f"What follows {w}? ({i})"},
                {"role": "assistant", "content": f"After {w} comes {WORDS[i % 16 - 1]}."},
            ],
        }
        for i, w in enumerate(WORDS * 12)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    small = [
        "--train.steps",
        12,
        "--train.batch_size",
        4,
        "--train.seq_len",
        64,
        "--checkpoint.every",
        6,
        "--train.compile",
        "false",
        "--validation.every",
        6,
        "--validation.batches",
        2,
    ]
    luban("corpus", "build", "text", "--heldout", 0.2, "--out", "corpus", cwd=root)
    luban("corpus", "build", "pairs.jsonl", "--heldout", 0.2, "--out", "questions", cwd=root)
    luban("tokenizer", "train", "corpus", "--vocab-size", 400, "--out", "tok", cwd=root)
    luban("data", "pack", "corpus", "--tokenizer", "tok", "--out", "shards", cwd=root)
    luban("data", "pack", "questions", "--tokenizer", "tok", "--out", "chat", cwd=root)
    luban("pretrain", "tiny_pretrain_cpu", "--data.path", "shards", *small, "--out", "base", cwd=root)
    luban("sft", "luban_sft_cpu", "--data.path", "chat", "--init", "base", *small, "--out", "sft", cwd=root)
    return root


def test_every_artifact_knows_its_ancestors(life):
    shown = json.loads(luban("inspect", "sft", "--json", cwd=life).stdout)
    assert len(shown["content_hash"]) == 64 and len(shown["weights_hash"]) == 64

    def walk(parents):
        for parent in parents:
            yield parent["kind"]
            yield from walk(parent["parents"])

    assert {"run", "shards", "tokenizer", "corpus"} <= set(walk(shown["parents"]))
    for name in ("corpus", "tok", "shards", "chat", "base", "sft"):
        luban("inspect", name, "--verify", cwd=life)


def test_evaluation_and_report(life):
    luban("eval", "base", "bits_per_byte", "--corpus", "corpus", "--out", "eval", cwd=life)
    figures = json.loads((life / "eval" / "figures.json").read_text())
    assert 0.5 < figures["bits_per_byte"] < 12 and figures["xz_bits_per_byte"] < 8
    luban("eval", "sft", "answer_loss", "samples", "--corpus", "questions", "--out", "eval-sft", cwd=life)
    assert json.loads((life / "eval-sft" / "figures.json").read_text())["answer_tokens"] > 0
    luban("report", ".", "--out", "report.html", cwd=life)
    assert "Learning: sft" in (life / "report.html").read_text()


def test_a_foreign_tokenizer_is_refused_and_both_sides_are_named(life):
    luban("tokenizer", "train", "corpus", "--vocab-size", 401, "--out", "other-tok", cwd=life)
    luban("data", "pack", "corpus", "--tokenizer", "other-tok", "--out", "other-shards", cwd=life)
    refused = luban(
        "pretrain",
        "tiny_pretrain_cpu",
        "--data.path",
        "other-shards",
        "--init",
        "base",
        "--out",
        "no",
        cwd=life,
        code=1,
    )
    assert refused.stderr.strip().count("\n") == 0 or "luban:" in refused.stderr.strip().splitlines()[-1]
    line = refused.stderr.strip().splitlines()[-1]
    assert "other-shards" in line and "base" in line and "tokenizer" in line
    assert not (life / "no").exists() and not (life / "no.incomplete").exists()


def test_generate_and_piped_chat(life):
    prompts = ("After stone", "After saw", "The gate", "A stone", "What follows")  # an answer may end at once
    assert any(luban("generate", "sft", prompt, "--max-tokens", 8, cwd=life).stdout.strip() for prompt in prompts)
    done = subprocess.run(
        [sys.executable, "-m", "luban", "chat", "sft", "--max-tokens", "8"],
        cwd=life,
        text=True,
        capture_output=True,
        input="What follows saw?\nWhat follows gate?\n",
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
