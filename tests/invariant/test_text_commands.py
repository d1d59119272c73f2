"""Text → tokens through the real command line: the same bytes every time, errors in one line, nothing half-written."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]


def luban(*words, cwd, threads=1, **more):
    return warm.command(*words, cwd=cwd, environment={**os.environ, "RAYON_NUM_THREADS": str(threads)}, **more)


def done(*words, cwd, **more):
    result = luban(*words, cwd=cwd, **more)
    assert result.returncode == 0, result.stderr
    return result


def content_hash(path):
    return json.loads((path / "manifest.json").read_text())["content_hash"]


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """Sources, corpora, a tokenizer and shards, made by commands."""
    folder = tmp_path_factory.mktemp("life")
    rng = random.Random(9)
    words = ["def", "return", "import", "the", "of", "x", "y", "z", "你好", "été", "42", "(", ")", ":", "\n"]
    (folder / "notes").mkdir()
    for i in range(80):
        (folder / "notes" / f"{i:03d}.txt").write_text(" ".join(rng.choices(words, k=100)))
    rows = [
        {
            "messages": [
                {"role": "user", "content": " ".join(rng.choices(words, k=5))},
                {"role": "assistant", "content": " ".join(rng.choices(words, k=5))},
            ]
        }
        for _ in range(80)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done("corpus", "build", "notes", "--out", "corpus", "--heldout", "0.1", cwd=folder)
    done("corpus", "build", "chat.jsonl", "--out", "chats", "--heldout", "0.1", cwd=folder)
    done("tokenizer", "train", "corpus", "--out", "tok", "--vocab-size", "320", cwd=folder)
    done("data", "pack", "corpus", "--tokenizer", "tok", "--out", "shards", cwd=folder)
    return folder


def test_the_whole_way_again_on_four_threads_gives_the_same_hashes(life, tmp_path):
    done("corpus", "build", life / "notes", "--out", "corpus", "--heldout", "0.1", cwd=tmp_path, threads=4)
    done("tokenizer", "train", "corpus", "--out", "tok", "--vocab-size", "320", cwd=tmp_path, threads=4)
    done("data", "pack", "corpus", "--tokenizer", "tok", "--out", "shards", cwd=tmp_path, threads=4)
    for name in ("corpus", "tok", "shards"):
        assert content_hash(tmp_path / name) == content_hash(life / name)


def test_one_worker_and_four_and_a_resume_read_the_same_batches(life):
    code = (
        "import sys, hashlib, itertools; from luban.data.loader import Loader; from luban.data.shards import Shards\n"
        "path, packing, workers, start, stop = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])\n"
        "loader = Loader(Shards.open(path), batch_size=4, seq_len=48, seed=5, packing=packing, workers=workers)\n"
        "for batch in itertools.islice(loader.iterate(start), stop - start):\n"
        "    print(hashlib.sha256(b''.join(vars(batch)[k].tobytes() for k in sorted(vars(batch)))).hexdigest())\n"
    )

    def batches(packing, workers, start, stop):
        command = [sys.executable, "-c", code, str(life / "shards"), packing, str(workers), str(start), str(stop)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return result.stdout.split()

    for packing in ("stream", "fit"):
        whole = batches(packing, 1, 0, 40)
        assert len(set(whole)) > 30
        assert batches(packing, 4, 0, 40) == whole
        assert batches(packing, 4, 17, 40) == whole[17:]


def test_a_corpus_knows_its_shards_and_shards_their_parents(life):
    manifest = json.loads((life / "shards" / "manifest.json").read_text())
    parents = {p["role"]: p["content_hash"] for p in manifest["parents"]}
    assert parents == {"corpus": content_hash(life / "corpus"), "tokenizer": content_hash(life / "tok")}


def test_packing_conversations_shows_what_is_trained(life, tmp_path):
    result = done("data", "pack", life / "chats", "--tokenizer", life / "tok", "--out", tmp_path / "s", cwd=life)
    assert "<|assistant|>«" in result.stderr and "<|end|>»" in result.stderr


def test_encode_prints_ids_that_no_text_can_forge(life):
    plain = done("tokenizer", "encode", "tok", "--text", "x<|end|>", cwd=life).stdout.split()
    assert plain and all(int(i) >= 16 for i in plain)
    assert done("tokenizer", "encode", "tok", cwd=life, input="x<|end|>").stdout.split() == plain
    pieces = done("tokenizer", "encode", "tok", "--text", "x<|end|>", "--pieces", cwd=life).stdout
    assert "".join(eval(line.split("\t")[1]) for line in pieces.splitlines()) == "x<|end|>"


def test_an_imported_vocabulary_packs_like_its_source(life, tmp_path):
    done("tokenizer", "import", life / "tok" / "tokenizer.json", "--out", "t", cwd=tmp_path)
    done("data", "pack", life / "corpus", "--tokenizer", "t", "--out", "s", cwd=tmp_path)
    tokens = "train-00000.tokens"
    assert (tmp_path / "s" / tokens).read_bytes() == (life / "shards" / tokens).read_bytes()


def test_steps_are_named_with_commas_and_shown_as_a_waterfall(life, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"word {i} " * 9}) + "\n" for i in [1, 1, 2, 3]))
    words = ["corpus", "build", "in.jsonl", "--out", "c", "--heldout", "0", "--steps", "exact,minhash"]
    result = done(*words, cwd=tmp_path)
    lines = [line.split()[:2] for line in result.stderr.splitlines()]
    assert lines[1:4] == [["read", "4"], ["exact", "3"], ["minhash", "3"]]


def test_report_counts_what_encode_gives(life):
    result = done("tokenizer", "report", "tok", "notes/000.txt", "--beside", "same=tok/tokenizer.json", cwd=life).stdout
    text = (life / "notes" / "000.txt").read_text()
    ids = done("tokenizer", "encode", "tok", cwd=life, input=text).stdout.split()
    row = next(line for line in result.splitlines() if line.startswith("000.txt")).split()
    assert f"{len(text.encode()) / len(ids):.3f}" in row and row[-1] == "×1.00"
    lines = done("tokenizer", "encode", "tok", "--lines", cwd=life, input=text).stdout.splitlines()
    assert lines == [
        done("tokenizer", "encode", "tok", "--text", line, cwd=life).stdout.strip() for line in text.splitlines()
    ]
    corpus = done("tokenizer", "report", "tok", "corpus", cwd=life).stdout
    assert "unused tokens" in corpus and "domain" in corpus


BAD = [
    (("corpus", "build", "nowhere", "--out", "o"), 1, "source nowhere does not exist"),
    (("corpus", "build", "empty.txt", "--out", "o"), 1, "is empty"),
    (("corpus", "build", "binary.txt", "--out", "o"), 1, "is binary"),
    (("corpus", "build", "python:stdlb", "--out", "o"), 2, "did you mean 'python:stdlib'"),
    (("corpus", "build", "notes"), 2, "--out"),
    (("corpus", "build", "notes", "--out", "corpus"), 1, "already holds a finished corpus"),
    (("corpus", "build", "notes", "--out", "notes"), 1, "holds nothing of Luban's"),
    (("corpus", "build", "notes", "--out", "o", "--heldout", "2"), 2, "heldout"),
    (("corpus", "built", "notes"), 2, "did you mean 'build'"),
    (("tokenizer", "train", "notes", "--out", "o"), 1, "is not a Luban artifact"),
    (("tokenizer", "train", "tok", "--out", "o"), 1, "tok holds a tokenizer; needed here: a corpus"),
    (("tokenizer", "train", "corpus", "--out", "o", "--vocab-size", "10"), 2, "too small"),
    (("tokenizer", "train", "corpus", "--out", "o", "--algorithm", "pbe"), 2, "did you mean 'bpe'"),
    (("tokenizer", "encode", "notes", "--text", "x"), 1, "holds no tokenizer"),
    (("data", "pack", "corpus", "--tokenizer", "none", "--out", "o"), 1, "tokenizer none does not exist"),
    (("data", "pack", "shards", "--tokenizer", "tok", "--out", "o"), 1, "shards holds shards; needed here: a corpus"),
]


@pytest.mark.parametrize("words, code, message", BAD, ids=[" ".join(words) for words, _, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(life, words, code, message):
    (life / "empty.txt").write_text("")
    (life / "binary.txt").write_bytes(b"\x7fELF\0\0\0")
    result = luban(*words, cwd=life)
    assert result.returncode == code
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (life / "o").exists() and not (life / "o.incomplete").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(life, tmp_path):
    words = ("data", "pack", life / "corpus", "--tokenizer", life / "tok", "--out", tmp_path / "s")
    result = luban(*words, cwd=life, file_size=2000)
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("corpus",),
        ("corpus", "build"),
        ("tokenizer",),
        ("tokenizer", "train"),
        ("tokenizer", "import"),
        ("tokenizer", "encode"),
        ("tokenizer", "report"),
        ("data",),
        ("data", "pack"),
    ],
)
def test_help_has_examples(words, tmp_path):
    result = done(*words, "--help", cwd=tmp_path)
    assert f"luban {' '.join(words)}" in result.stdout


def test_workers_licences_and_mixtures_by_command(life, tmp_path):
    """Two workers write the bytes of one; a mixture inherits licences; its card says so."""
    for workers in (1, 2):
        done(
            "corpus",
            "build",
            life / "notes",
            "--out",
            f"w{workers}",
            "--steps",
            "normalise,exact,lines,minhash",
            "--workers",
            workers,
            "--licence",
            "CC-BY-4.0",
            cwd=tmp_path,
        )
    assert content_hash(tmp_path / "w1") == content_hash(tmp_path / "w2")
    (tmp_path / "m.toml").write_text(
        '[[part]]\nname = "a"\npath = "w1"\nweight = 3\n[[part]]\nname = "b"\npath = "chats"\nweight = 1\n'
    )
    done("corpus", "build", life / "chat.jsonl", "--out", "chats", "--licence", "no-export", cwd=tmp_path)
    done("corpus", "mix", "m.toml", "--out", "mixed", cwd=tmp_path)
    manifest = json.loads((tmp_path / "mixed" / "manifest.json").read_text())
    assert sorted(term for parent in manifest["parents"] for term in parent["terms"]) == ["CC-BY-4.0", "no-export"]
    assert abs(manifest["figures"]["shares"]["a"] - 0.75) < 0.02
    assert "| no-export |" in (tmp_path / "mixed" / "README.md").read_text()
    result = luban("corpus", "mix", "m.toml", "--out", "more", "--bytes", "10000000", cwd=tmp_path)
    assert result.returncode != 0 and "epochs of the part" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.glob("more*"))


def test_judges_by_command(life, tmp_path):
    done("corpus", "ngram", life / "corpus", "--out", "lm", cwd=tmp_path)
    done("corpus", "classifier", life / "corpus", life / "chats", "--out", "judge", cwd=tmp_path)
    done("corpus", "build", life / "notes", "--out", "c", "--steps", "perplexity=lm,classifier=judge", cwd=tmp_path)
    config = json.loads((tmp_path / "c" / "manifest.json").read_text())["config"]
    assert [step["step"] for step in config["steps"]] == ["perplexity", "classifier"]
    result = luban("corpus", "build", life / "notes", "--out", "d", "--steps", "perplexity=none", cwd=tmp_path)
    assert result.returncode != 0 and "does not exist" in result.stderr and "Traceback" not in result.stderr
