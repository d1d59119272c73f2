"""`python:packages` reads what is installed, as its metadata names it, and nothing twice."""

from __future__ import annotations

import json
import random
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest

from luban.corpus.build import build_corpus
from luban.corpus.reader import read_corpus
from luban.corpus.sources import find_sources
from luban.corpus.sources.packages import PART_BYTES, installed_files, licence_of
from luban.corpus.tally import Tally

MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder of installed packages, the only one on the path."""
    monkeypatch.setattr(metadata, "distributions", partial(metadata.distributions, path=[str(tmp_path)]))
    installed_files.cache_clear()
    yield tmp_path
    installed_files.cache_clear()


def install(site: Path, name: str, files: dict[str, str], fields: str = "License-Expression: MIT", **extra: str):
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    everything = {**files, **{f"{info}/{at.replace('__', '/')}": text for at, text in extra.items()}}
    everything[f"{info}/METADATA"] = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{fields}\n"
    for at, text in everything.items():
        (site / at).parent.mkdir(parents=True, exist_ok=True)
        (site / at).write_text(text, encoding="utf-8")
    record = f"{info}/RECORD"
    (site / record).write_text("".join(f"{at},,\n" for at in [*everything, record]))


def source(seed: int, lines: int = 30) -> str:
    """Lines of Python that no other seed has."""
    draw = random.Random(seed)
    return "".join(f"value_{draw.randrange(10**9)} = call_{draw.randrange(10**9)}('text')\n" for _ in range(lines))


def documents(label: str = "python:packages") -> dict[str, str]:
    (found,) = find_sources([label])
    return {document.id.removeprefix(label + "/"): document.text for document in found.documents(Tally(), 0, 0.0)}


def test_modules_are_read_with_their_names_and_tests_and_copies_are_not(site):
    texts = {
        "alpha/__init__.py": source(1),
        "alpha/deep/one.py": source(2),
        "alpha/tests/test_one.py": source(3),
        "alpha/_vendor/other.py": source(4),
        "alpha/data.txt": "no source",
        "alpha/empty.py": "\n",
        "single.py": source(5),
        "test_stray.py": source(6),
    }
    install(site, "Alpha.Package", texts)
    install(site, "luban", {"luban/secret.py": source(7)})
    assert documents() == {
        "alpha-package/alpha/__init__.py": f"# module: alpha\n{source(1)}",
        "alpha-package/alpha/deep/one.py": f"# module: alpha.deep.one\n{source(2)}",
        "alpha-package/single.py": f"# module: single\n{source(5)}",
    }


@pytest.mark.parametrize(
    "fields, extra, wanted",
    [
        ("License-Expression: Apache-2.0 OR BSD-2-Clause", {}, "Apache-2.0 OR BSD-2-Clause"),
        ("License: mit", {}, "MIT"),
        ("License: Some words\nClassifier: License :: OSI Approved :: BSD License", {}, "BSD-3-Clause"),
        ("License: Some words", {"licenses__LICENSE": MIT}, "MIT"),
        ("", {"COPYING": "GNU General Public License"}, "GPL"),
        ("", {}, None),
    ],
)
def test_licences_come_from_metadata_first(site, fields, extra, wanted):
    install(site, "beta", {"beta.py": source(1)}, fields, **extra)
    (file,) = installed_files()
    assert file.licence == wanted
    tally = Tally()
    (found,) = find_sources(["python:packages"])
    read = list(found.documents(tally, 0, 0.0))
    assert [document.meta["licence"] for document in read] == ([wanted] if wanted not in ("GPL", None) else [])
    if not read:
        assert tally.figures()["dropped"] == {
            f"code: licence {wanted or 'unknown'}": {"documents": 1, "bytes": len(f"# module: beta\n{source(1)}")}
        }


def test_parts_together_are_the_whole_in_order(site):
    for number in range(7):
        install(site, f"p{number}", {f"p{number}/{n}.py": source(100 * number + n, 4000) for n in range(4)})
    (found,) = find_sources(["python:packages"])
    parts = found.parts(Tally())
    assert len(parts) > 1 and all(0 < part.size() <= PART_BYTES for part in parts)
    whole = [document.id for document in found.documents(Tally(), 0, 0.0)]
    assert [document.id for part in parts for document in part.documents(Tally(), 0, 0.0)] == whole and len(whole) == 28


def test_what_an_evaluation_set_holds_is_cut_from_packages(site):
    """A package that carries a copy of a held-out definition, as backports do."""
    copies = [source(1000 + n) for n in range(5)]
    (site / "heldout.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in copies))
    files = {f"copy/n{n}.py": source(n, 60) + text + source(-n - 1, 60) for n, text in enumerate(copies)}
    install(site, "copy", files)
    build_corpus(
        ["python:packages"],
        site / "packages",
        heldout=0.0,
        steps=["exact", f"contamination={site / 'heldout.jsonl'}"],
    )
    left = "\n".join(document.text for document in read_corpus(site / "packages", "train"))
    for n, text in enumerate(copies):
        before, after = source(n, 60), source(-n - 1, 60)
        assert before[: len(before) - 300] in left and after[300:] in left
        assert not any(line in left for line in text.splitlines())


def test_licence_of_a_distribution_without_files(site):
    install(site, "gamma", {}, "License-Expression: 0BSD")
    (found,) = metadata.distributions()
    assert licence_of(found) == "0BSD"
