"""Licences: every document keeps its own, through builds and mixtures, however they are written."""

from __future__ import annotations

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luban.core.artifact import read_manifest
from luban.core.errors import ConfigError, LineageError
from luban.core.terms import require_exportable
from luban.corpus.build import build_corpus
from luban.corpus.licences import all_of, any_of, of_source_file, of_text, parts, permitted, spdx, unknown_names
from luban.corpus.mixture import Part, mix
from luban.corpus.reader import read_corpus
from luban.corpus.sources import find_sources
from luban.corpus.tally import Tally

MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"
APACHE = "Apache License\nVersion 2.0, January 2004"
GPL = "GNU General Public License, version 3"


def counted(figures) -> dict[str, int]:
    return {name: counts["documents"] for name, counts in figures["licences"].items()}


def test_a_licence_of_one_source_stays_with_its_documents_in_a_mixture(tmp_path):
    rng = random.Random(3)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(" ".join(rng.choices("abcdefgh", k=50)))
    (tmp_path / "c.jsonl").write_text('{"text": "one", "license": "mit"}\n{"text": "two", "licence": "CC-BY-4.0"}\n')
    (tmp_path / "d.txt").write_text(" ".join(rng.choices("abcdefgh", k=50)))
    figures = build_corpus(
        [str(tmp_path / name) for name in ("a.txt", "b.txt")], tmp_path / "ab", heldout=0.0, licences={"a.txt": "MIT"}
    )
    assert counted(figures) == {"MIT": 1, "unknown": 1}
    build_corpus([str(tmp_path / "c.jsonl")], tmp_path / "c", heldout=0.0)
    build_corpus([str(tmp_path / "d.txt")], tmp_path / "d", heldout=0.0, licences={"": "ODC-BY-1.0"})
    made = mix([Part(name=n, path=str(tmp_path / n), weight=1, epochs=1) for n in ("ab",)], tmp_path / "m1")
    assert counted(made) == {"MIT": 1, "unknown": 1}
    parts_ = [
        Part(name=n, path=str(tmp_path / n), weight=read_manifest(tmp_path / n).figures["train"]["bytes"])
        for n in ("ab", "c", "d")
    ]
    made = mix(parts_, tmp_path / "m2")
    assert counted(made) == {"MIT": 2, "CC-BY-4.0": 1, "ODC-By-1.0": 1, "unknown": 1}
    assert read_manifest(tmp_path / "m2").terms == ("CC-BY-4.0", "MIT", "ODC-By-1.0")
    again = mix([Part(name="m", path=str(tmp_path / "m2"), weight=1)], tmp_path / "m3")
    assert counted(again) == counted(made)
    assert "The licence of some documents is unknown." in (tmp_path / "m3" / "README.md").read_text()


@pytest.mark.parametrize(
    "licences, words",
    [
        ({"a.tx": "MIT"}, r"no source is called 'a.tx' \(did you mean 'a.txt'\?\); the sources are a.txt"),
        ({"a.txt": " "}, "the licence of a.txt is empty"),
        ({"b": "MIT"}, "no source is called 'b'"),
        (
            {"": "mti"},
            r"'mti' is no licence of SPDX's list \(did you mean 'MIT'\?\); a name of your own begins with Lic",
        ),
        ({"a.txt": "MIT OR apache-2"}, r"'apache-2' is no licence of SPDX's list \(did you mean 'Apache-2.0'\?\)"),
    ],
)
def test_a_mistyped_source_or_an_empty_licence_is_refused(tmp_path, licences, words):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=words):
        build_corpus([str(tmp_path / "a.txt")], tmp_path / "c", heldout=0.0, licences=licences)
    assert not (tmp_path / "c").exists()


def test_a_source_is_named_by_label_or_path(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for number, name in enumerate(["a.txt", str(tmp_path / "a.txt")]):
        figures = build_corpus([str(tmp_path / "a.txt")], tmp_path / str(number), heldout=0.0, licences={name: "mit"})
        assert counted(figures) == {"MIT": 1}
    assert read_manifest(tmp_path / "0").config == read_manifest(tmp_path / "1").config
    (tmp_path / "b.txt").write_text("other text")
    (tmp_path / "c.md").write_text("third text")
    figures = build_corpus(
        [f"{tmp_path}/*.txt", f"{tmp_path}/c.md"],
        tmp_path / "2",
        heldout=0.0,
        licences={f"{tmp_path}/*.txt": "MIT", "": "CC0-1.0"},
    )
    assert counted(figures) == {"MIT": 2, "CC0-1.0": 1}


def test_columns_of_parquet_are_kept(tmp_path):
    pq.write_table(
        pa.table(
            {
                "text": ["one", "two", "three"],
                "license": ["mit", None, None],
                "licence": [None, "cc-by-4.0", None],
                "licenses": [None, None, ["MIT", "gpl-3.0-only"]],
                "url": ["u1", "u2", "u3"],
            }
        ),
        tmp_path / "a.parquet",
    )
    figures = build_corpus([str(tmp_path / "a.parquet")], tmp_path / "c", heldout=0.0)
    assert counted(figures) == {"MIT": 1, "CC-BY-4.0": 1, "MIT AND GPL-3.0-only": 1}
    assert [d.meta["url"] for d in read_corpus(tmp_path / "c")] == ["u1", "u2", "u3"]
    assert read_manifest(tmp_path / "c").terms == ("CC-BY-4.0", "GPL-3.0-only", "MIT")


@pytest.mark.parametrize(
    "licence, forbidden",
    [
        ("cc-by-nd-4.0", True),
        ("CC-BY-ND-4.0 AND MIT", True),
        ("MIT OR proprietary", False),
        ("research-only OR proprietary", True),
        ("(MIT OR Apache-2.0) AND no-export", True),
        ("mit", False),
    ],
)
def test_a_forbidden_export_is_refused_however_it_is_written(tmp_path, licence, forbidden):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one", "license": licence}))
    build_corpus([str(tmp_path / "a.jsonl")], tmp_path / "c", heldout=0.0)
    if forbidden:
        with pytest.raises(LineageError, match="must not be exported"):
            require_exportable(read_manifest(tmp_path / "c"), "c")
    else:
        require_exportable(read_manifest(tmp_path / "c"), "c")


FILES = {
    "LICENSE": MIT,
    "a.py": "x = 1\n",
    "spdx.py": "# SPDX-License-Identifier: GPL-3.0-or-later\nx = 2\n",
    "choice.c": "/* SPDX-License-Identifier: GPL-2.0-only OR MIT */\nint x = 1;\n",
    "both.js": "// SPDX-License-Identifier: MIT AND Apache-2.0\nvar x = 1;\n",
    "with.c": "// SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note\nint a;\n",
    "words.py": "# This program is free software under the GNU\n# General Public License, version 3.\nx = 4\n",
    "isc.js": "/*\n * Permission to use, copy, modify, and/or distribute this\n * software for any purpose\n */\nvar x;\n",
    "license.py": "def licences():\n    return 1\n",
    "dual/LICENSE-MIT": MIT,
    "dual/LICENSE-APACHE": APACHE,
    "dual/b.rs": "fn b() {}\n",
    "ruby/MIT-LICENSE.txt": MIT,
    "ruby/c.rb": "def c() = 1\n",
    "and/LICENSE": MIT,
    "and/LICENSE-third-party.txt": GPL,
    "and/d.py": "d = 1\n",
    "gnu/COPYING": GPL,
    "gnu/COPYING.LESSER": "GNU Lesser General Public License",
    "gnu/e.py": "e = 1\n",
    "md/LICENSE.md": APACHE,
    "md/f.py": "f = 1\n",
    "none/LICENSE": "All rights reserved.",
    "none/g.py": "g = 1\n",
}


def test_a_files_own_licence_goes_before_its_folders(tmp_path):
    for name, text in FILES.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    (source,) = find_sources([f"code:{tmp_path / 'tree'}"])
    tally = Tally()
    found = {d.id.removeprefix("tree/"): d.meta["licence"] for d in source.documents(tally, 0, 0.0)}
    assert found == {
        "a.py": "MIT",
        "choice.c": "GPL-2.0-only OR MIT",
        "both.js": "MIT AND Apache-2.0",
        "isc.js": "ISC",
        "license.py": "MIT",
        "dual/b.rs": "Apache-2.0 OR MIT",
        "ruby/c.rb": "MIT",
        "md/f.py": "Apache-2.0",
    }
    assert {reason: counts["documents"] for reason, counts in tally.dropped.items()} == {
        "code: licence GPL-3.0-or-later": 1,
        "code: licence GPL": 2,
        "code: licence unknown": 1,
        "code: licence MIT AND GPL": 1,
        "code: licence GPL-2.0-only WITH Linux-syscall-note": 1,
    }


TAGGED = {
    "LICENSE-MIT": MIT,
    "LICENSE-APACHE": APACHE,
    "x.py": "x = 1\n",
    "notes.txt": "About the GNU General Public License",
}
TAGGED |= {
    "sub/y.py": "# SPDX-License-Identifier: GPL-3.0-only\ny = 1\n",
    "sub/header.py": "# Licensed under the BSD 3-Clause License\nz = 1\n",
    "sub/paper.tex": "% SPDX-License-Identifier: CC-BY-4.0\n\\documentclass{article}\\begin{document}Words\\end{document}",
    "sub/page.html": "<!-- SPDX-License-Identifier: CC0-1.0 --><html><body><p>Some words of a page.</p></body></html>",
    "rows/r.jsonl": '{"text": "SPDX-License-Identifier: ISC"}\n{"text": "two", "licence": "Zlib"}\n',
    "own/LICENSE": "All rights reserved.",
    "own/w.py": "w = 1\n",
}


@pytest.mark.parametrize("declared", [{}, {"": "CC-BY-SA-4.0"}])
def test_files_of_plain_folders_have_their_licences_too(tmp_path, declared):
    for name, text in TAGGED.items():
        (tmp_path / "l" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "l" / name).write_text(text)
    build_corpus([str(tmp_path / "l")], tmp_path / "c", heldout=0.0, licences=declared)
    found = {d.id.removeprefix("l/"): (d.meta or {}).get("licence") for d in read_corpus(tmp_path / "c")}
    rest = declared.get("")
    assert found == {
        **dict.fromkeys(["LICENSE-MIT", "LICENSE-APACHE", "x.py", "notes.txt"], "Apache-2.0 OR MIT"),
        "sub/y.py": "GPL-3.0-only",
        "sub/header.py": "BSD-3-Clause",
        "sub/paper.tex": "CC-BY-4.0",
        "sub/page.html": "CC0-1.0",
        "rows/r.jsonl#000000000": "Apache-2.0 OR MIT",
        "rows/r.jsonl#000000041": "Zlib",
        "own/LICENSE": rest,
        "own/w.py": rest,
    }


def test_a_file_given_alone_has_its_own_licence_or_that_of_the_file_beside_it(tmp_path):
    for name in ("x.py", "sub/y.py", "LICENSE-MIT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TAGGED[name])
    (tmp_path / "sub/z.py").write_text("z = 1\n")
    figures = build_corpus([str(tmp_path / n) for n in ("x.py", "sub/y.py", "sub/z.py")], tmp_path / "c", heldout=0.0)
    assert counted(figures) == {"MIT": 1, "GPL-3.0-only": 1, "unknown": 1}  # no folder above those given is searched


@pytest.mark.parametrize(
    "text, licence",
    [
        ("# Licensed under the BSD 3-Clause License", "BSD-3-Clause"),
        (
            "// Licensed under the Apache License, Version 2.0 <LICENSE-APACHE> or the\n// MIT license <LICENSE-MIT>,",
            "Apache-2.0 OR MIT",
        ),
        ('# Licensed under the Apache License, Version 2.0 (the "License");\n# you may not use', "Apache-2.0"),
        (
            "/* released under the terms of the MIT license. Parts are licensed under the BSD 2-Clause license. */",
            "MIT AND BSD-2-Clause",
        ),
        ('__license__ = "GPLv3"\n', "GPL"),
        ("/** @license MIT */", "MIT"),
        ("# License: BSD 3 clause", "BSD-3-Clause"),
        (
            "This work is licensed under a Creative Commons Attribution-ShareAlike 4.0 International License.",
            "CC-BY-SA-4.0",
        ),
        ("licensed under CC-BY-NC-ND-4.0", "CC-BY-NC-ND-4.0"),
        ("# governed by a BSD-style license that can be found in the LICENSE file", None),
        ("# distributed under the same license as the package", None),
        ("license = x.mit; mitigate = under(mit)", None),
        ("Licensed under the MIT license.\nGNU General Public License, version 3", "MIT AND GPL"),
    ],
)
def test_sentences_that_name_a_licence(text, licence):
    assert of_source_file(text) == licence
    assert licence is None or not unknown_names(licence)


def test_names_that_spdx_does_not_have_stand_on_the_card(tmp_path):
    rows = [
        {"text": "one", "licence": "mti"},
        {"text": "two", "licence": "OFL-1.1 OR LicenseRef-Own"},
        {"text": "three"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build_corpus([str(tmp_path / "a.jsonl")], tmp_path / "c", heldout=0.0)
    card = (tmp_path / "c" / "README.md").read_text()
    assert (
        "The licence name 'mti' is not on SPDX's list (did you mean 'MIT'?)." in card and card.count("SPDX's list") == 1
    )


def test_a_licence_that_is_no_name_is_unknown(tmp_path):
    rows = [
        {"text": "one", "meta": {"licence": {"name": "MIT"}}},
        {"text": "two", "license": 3},
        {"text": "three", "license": [None, "MIT"]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert counted(build_corpus([str(tmp_path / "a.jsonl")], tmp_path / "c", heldout=0.0)) == {"MIT": 1, "unknown": 2}


def test_expressions():
    assert spdx(" mit  and apache-2.0 ") == "MIT AND Apache-2.0" and spdx("(mit or isc)") == "(MIT OR ISC)"
    assert spdx("Some Own Licence") == "Some Own Licence" and spdx("") == ""
    assert (
        all_of(["MIT", "mit", "a OR b"]) == "MIT AND (a OR b)" and all_of(["a OR b"]) == "a OR b" and all_of([]) == ""
    )
    assert any_of(["Apache-2.0", "mit"]) == "Apache-2.0 OR MIT"
    assert parts("MIT AND (a OR b AND c) AND d") == ["MIT", "a OR b AND c", "d"] and parts("MIT") == ["MIT"]
    assert permitted("MIT AND (GPL OR ISC)", ["MIT", "ISC"]) and not permitted("MIT AND GPL", ["MIT"])
    assert of_source_file("code\n" * 2000 + "SPDX-License-Identifier: MIT") is None  # not at the beginning
    assert of_source_file("See the GNU General Public License", prose=True) is None
    assert spdx(MIT + "\n" * 3 + "and so on. " * 20) == "MIT" and spdx("x y " * 50) == ("x y " * 25) + "…"
    assert of_source_file("<!-- SPDX-License-Identifier: MIT -->") == "MIT" and of_text(APACHE) == "Apache-2.0"
