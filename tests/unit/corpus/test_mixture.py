"""Mixtures have their shares, epochs and lineage; licences come along and can forbid an export."""

from __future__ import annotations

import json
import random
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import luban.recipes
from luban.core.artifact import ArtifactWriter, as_parent, open_artifact, read_manifest
from luban.core.config import load_toml
from luban.core.errors import ArtifactError, ConfigError, DataError, LineageError
from luban.core.terms import inherited_terms, require_exportable
from luban.corpus.build import build_corpus
from luban.corpus.mixture import EXAMPLE, Part, mix, parts_of
from luban.corpus.reader import read_corpus

LLAMA = Path(luban.recipes.__file__).parent / "mixtures" / "llama.toml"
SHARES = {"commoncrawl": 67, "c4": 15, "github": 4.5, "wikipedia": 4.5, "books": 4.5, "arxiv": 2.5, "stackexchange": 2}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A corpus of 300 to 600 documents for each of LLaMA's sources."""
    folder, rng = tmp_path_factory.mktemp("corpora"), random.Random(1)
    for name in SHARES:
        rows = [
            {"text": " ".join(rng.choices("abcdefgh", k=rng.randint(5, 60))), "id": i}
            for i in range(rng.randint(300, 600))
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        licence = {"wikipedia": "CC-BY-SA-4.0", "books": "research-only"}.get(name, "CC0-1.0")
        build_corpus([str(folder / f"{name}.jsonl")], folder / name, steps=(), licences={"": licence})
    return folder


def test_llamas_recipe_gives_llamas_shares(corpora, tmp_path):
    parts = parts_of(load_toml(LLAMA), corpora)
    assert {part.name: part.weight for part in parts} == SHARES
    figures = mix(parts, tmp_path / "m")
    sizes = Counter()
    for seen, document in enumerate(read_corpus(tmp_path / "m"), 1):
        sizes[document.source] += document.bytes
        if seen >= 500:  # the shares hold from the beginning to any point
            assert all(abs(100 * sizes[n] / sizes.total() - share) < 1.5 for n, share in SHARES.items())
    assert all(abs(100 * sizes[name] / sizes.total() - share) < 0.3 for name, share in SHARES.items())
    assert figures["shares"] == {name: sizes[name] / sizes.total() for name in figures["shares"]}
    limit = {part.name: part.epochs for part in parts}
    held = {name: read_manifest(corpora / name).figures["train"]["bytes"] for name in SHARES}
    used = {name: sizes[name] / held[name] / limit[name] for name in SHARES}
    assert 0.97 < max(used.values()) < 1.01  # as many bytes as the part that is short allows


def test_epochs_repeat_in_order_and_are_refused_beyond_what_is_allowed(corpora, tmp_path):
    parts = [
        Part(name="a", path=str(corpora / "books"), weight=3, epochs=2.5),
        Part(name="b", path=str(corpora / "c4"), weight=1),
    ]
    mix(parts, tmp_path / "m")
    found = [d.id.removeprefix("a/") for d in read_corpus(tmp_path / "m") if d.source == "a"]
    once = [d.id for d in read_corpus(corpora / "books")]
    assert found[: len(once)] == once and found[len(once)] == once[0] + "@2" and len(set(found)) == len(found)
    held = [d.id for d in read_corpus(tmp_path / "m", "heldout")]
    assert (
        len(held)
        == len(set(held))
        == sum(read_manifest(corpora / n).figures["heldout"]["documents"] for n in ("books", "c4"))
    )
    with pytest.raises(DataError, match=r"epochs of the part '[ab]', and (2.5|1.0) are allowed"):
        mix(parts, tmp_path / "too-much", size=10**9)
    assert not list(tmp_path.glob("too-much*"))


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"part": []},
        {"part": [{"name": "a", "path": "p"}]},
        {"part": [{"name": "a", "path": "p", "weight": 0}]},
        {"part": [{"name": "a", "path": "p", "weight": 1, "wieght": 2}]},
        {"part": [{"name": "a", "path": "p", "weight": 1}] * 2},
        {"parts": []},
    ],
)
def test_wrong_recipes_are_refused(recipe):
    with pytest.raises(ConfigError):
        parts_of(recipe)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"path": "p"}, "missing field 'part 1.weight'"),
        ({"weight": 1}, "missing field 'part 1.path'"),
        ({"path": "p", "wieght": 1}, r"unknown field 'part 1.wieght' \(did you mean 'weight'\?\)"),
        ({"path": 3, "weight": 1}, "part 1.path: text is needed, 3 given"),
        ("p", "part 1: a table is needed, 'p' given"),
        ({"path": "p", "weight": "1"}, "mixture part 1: weight must be a number above 0, '1' given"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_in_its_own_words(part, words):
    with pytest.raises(ConfigError, match=words):
        parts_of({"part": [part]})


def test_a_part_is_named_after_its_folder():
    tables = [{"path": "x/books", "weight": 1}, {"path": "y/books/", "weight": 2, "name": "more"}]
    assert [part.name for part in parts_of({"part": tables})] == ["books", "more"]
    with pytest.raises(ConfigError, match="two parts of the mixture are called 'books': give one another name"):
        parts_of({"part": [tables[0], {**tables[1], "name": "books"}]})
    assert len(parts_of(tomllib.loads(EXAMPLE))) == 2  # of --help


def test_a_part_that_is_no_corpus_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        mix([Part(name="a", path=str(tmp_path / "none"), weight=1)], tmp_path / "m")


def test_licences_are_inherited_and_the_forbidding_parent_is_named(corpora, tmp_path):
    mix(parts_of(load_toml(LLAMA), corpora), tmp_path / "mixed")
    with ArtifactWriter(tmp_path / "run", kind="run", parents=(as_parent("shards", tmp_path / "mixed"),)) as art:
        (art.path / "x").write_text("weights")
    run = read_manifest(tmp_path / "run")
    terms = inherited_terms(run)
    assert set(terms) == {"CC-BY-SA-4.0", "CC0-1.0", "research-only"} and "the corpus books" in terms["research-only"]
    with pytest.raises(LineageError, match=r"the corpus books, which it was made from, is under research-only"):
        require_exportable(run, "run")
    free = [p for p in parts_of(load_toml(LLAMA), corpora) if p.name != "books"]
    mix(free, tmp_path / "free")
    require_exportable(read_manifest(tmp_path / "free"), "free")


def test_terms_cannot_be_edited_away(corpora, tmp_path):
    build_corpus([str(corpora / "books.jsonl")], tmp_path / "c", licences={"": "proprietary"})
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["terms"] == ["proprietary"]
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest | {"terms": []}))
    with pytest.raises(ArtifactError, match="was edited"):
        open_artifact(tmp_path / "c")


def test_a_documents_own_licence_goes_before_its_sources(tmp_path):
    rows = [{"text": "one", "licence": "MIT"}, {"text": "two"}, {"text": "three", "meta": {"licence": "CC-BY-4.0"}}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("four")
    figures = build_corpus(
        [str(tmp_path / "in.jsonl"), str(tmp_path / "b.txt")],
        tmp_path / "c",
        heldout=0.0,
        licences={"in.jsonl": "ODC-BY-1.0"},
    )
    assert {name: c["documents"] for name, c in figures["licences"].items()} == {
        "MIT": 1,
        "CC-BY-4.0": 1,
        "ODC-By-1.0": 1,
        "unknown": 1,
    }
    assert figures["sources"]["in.jsonl"] == {"documents": 3, "bytes": 11}
    card = (tmp_path / "c" / "README.md").read_text()
    assert "| ODC-By-1.0 | 1 | 3 |" in card and "| in.jsonl | 3 | 11 |" in card
    assert "The licence of some documents is unknown." in card and "Repeated documents" not in card
    assert "Near-duplicates were not looked for." in card and "| train | 4 | 15 |" in card


def built(folder, name: str, texts: list, seed: int, steps=(), **options):
    """A corpus of texts (or whole rows) under a name."""
    rows = [row if isinstance(row, dict) else {"text": row} for row in texts]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_corpus([str(folder / f"{name}.jsonl")], folder / name, seed=seed, steps=steps, heldout=0.3, **options)
    return Part(name=name, path=str(folder / name), weight=1, epochs=2)


def test_what_a_part_holds_out_is_not_trained_on_from_another(tmp_path):
    """The same documents in two corpora, split by other seeds and written otherwise: none is in both splits."""
    rng = random.Random(2)
    texts = [" ".join(rng.choices("abcdefghijklmnop", k=rng.randint(5, 60))) for _ in range(200)]
    texts += ["!!!", "???"]  # without words
    written = [text.upper().replace(" ", ",  ") for text in texts]
    parts = [built(tmp_path, "a", texts, 1), built(tmp_path, "b", written, 2), built(tmp_path, "c", texts[:50], 3)]
    figures = mix(parts, tmp_path / "m")

    def plain(path: object, split: str) -> dict[str, int]:
        return {"".join(c for c in d.text.lower() if c not in " ,"): d.bytes for d in read_corpus(path, split)}

    expected = {}
    splits = {part.name: {split: plain(part.path, split) for split in ("train", "heldout")} for part in parts}
    every = {text for found in splits.values() for text in found["heldout"]}
    assert plain(tmp_path / "m", "heldout").keys() == every and not every & plain(tmp_path / "m", "train").keys()
    for name, found in splits.items():
        leaks = [bytes_ for text, bytes_ in found["train"].items() if text in every]
        if leaks:
            expected[name] = {"documents": len(leaks), "bytes": sum(leaks)}
    assert figures["held_out_elsewhere"] == expected and set(expected) == {"a", "b", "c"}


def test_another_version_of_a_held_out_document_is_known_by_its_id(tmp_path):
    """The same file built with other steps: lines, pieces and addresses are cut, and what is left is still the document."""
    rng = random.Random(6)
    leaks = [" ".join(rng.choices("abcdefghijklmnop", k=20)) for _ in range(60)]
    words = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(3000)]
    texts = [" ".join([*rng.choices(words, k=150), leak, *rng.choices(words, k=150), "mail x@y.org"]) for leak in leaks]
    (tmp_path / "set.txt").write_text("\n".join(leaks))
    whole = built(tmp_path, "in", texts, 1)
    cut = replace(whole, name="cut", path=str(tmp_path / "cut"))
    build_corpus(
        [str(tmp_path / "in.jsonl")],
        tmp_path / "cut",
        heldout=0.3,
        seed=2,
        steps=["personal", f"contamination={tmp_path / 'set.txt'}"],
    )
    unrelated = built(tmp_path, "other", [" ".join(rng.choices(words, k=100)) for _ in range(60)], 3)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "in.jsonl").write_bytes(
        (tmp_path / "other.jsonl").read_bytes()
    )  # the same ids, other documents
    build_corpus([str(tmp_path / "again" / "in.jsonl")], tmp_path / "same-ids", heldout=0.0)
    same_ids = replace(unrelated, name="same-ids", path=str(tmp_path / "same-ids"))
    figures = mix([whole, cut, same_ids], tmp_path / "m")
    train, held = (
        {
            (d.source == "same-ids", d.id.partition("/")[2].partition("~")[0].partition("@")[0])
            for d in read_corpus(tmp_path / "m", split)
        }
        for split in ("train", "heldout")
    )
    assert not train & held and len(held) > 20
    assert "same-ids" not in figures["held_out_elsewhere"] and set(figures["held_out_elsewhere"]) == {"in", "cut"}


def test_epochs_are_counted_without_what_is_left_out(tmp_path):
    texts = [f"text number {i} of all" for i in range(100)]
    parts = [built(tmp_path, "a", texts, 1), built(tmp_path, "b", texts, 2)]
    mix(parts, tmp_path / "m")
    used = Counter(d.id.partition("@")[0] for d in read_corpus(tmp_path / "m"))
    assert max(used.values()) == 2  # no document more often than its epochs


def test_conversations_in_other_roles_are_no_leak(tmp_path):
    rows = [
        {"messages": [{"role": r, "content": f"the {i}th text"}, {"role": "assistant", "content": "yes"}]}
        for i in range(40)
        for r in ("user", "system")
    ]
    figures = mix([built(tmp_path, "a", rows[::2], 1), built(tmp_path, "b", rows[1::2], 2)], tmp_path / "m")
    assert figures["held_out_elsewhere"] == {}


def test_nothing_left_of_a_part_and_wrong_sizes_are_refused(tmp_path):
    whole = built(tmp_path, "a", [f"text {i}" for i in range(30)], 1)
    held = [d.text for d in read_corpus(whole.path, "heldout")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held))
    build_corpus([str(tmp_path / "b.jsonl")], tmp_path / "b", heldout=0.0)
    with pytest.raises(DataError, match="part 'b' of the mixture has nothing to train on"):
        mix([whole, Part(name="b", path=str(tmp_path / "b"), weight=1)], tmp_path / "m")
    with pytest.raises(ConfigError, match="-5 given"):
        mix([whole], tmp_path / "m", size=-5)
    assert not list(tmp_path.glob("m*"))


def test_ids_are_unique_whatever_the_source_gives(tmp_path, monkeypatch):
    """The same id on many rows, and ids that look like renamed ones or like a further epoch's."""
    monkeypatch.setattr("luban.corpus.unique.BATCH", 3)
    rows = [
        {"id": i, "text": f"text {n}"} for n, i in enumerate(["x", "x", "x#2", "x", "x@2", "y", "x", "x@2", 7, 7, "7"])
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = build_corpus([str(tmp_path / "in.jsonl")], tmp_path / "c", heldout=0.0)
    ids = [d.id for d in read_corpus(tmp_path / "c")]
    assert len(set(ids)) == len(ids) == 11 and figures["counts"]["repeated_ids_renamed"] == 7
    assert [i.partition("#")[2] for i in ids[:4]] == ["x", "x#2", "x#2#2", "x#3"]
    mix([Part(name="p", path=str(tmp_path / "c"), weight=1, epochs=3)], tmp_path / "m")
    mixed = [d.id for d in read_corpus(tmp_path / "m")]
    assert len(set(mixed)) == len(mixed) == 33
