"""What the readmes say can be done: their commands are understood, their links lead somewhere, both languages say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from luban.cli.main import VERBS

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "README.zh.md", "docs/README.md", "docs/README.zh.md")


def commands(page: str) -> list[str]:
    """The command lines in a page's blocks, without their comments."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text())
    assert links and all((ROOT / page).parent.joinpath(link).exists() for link in links), links


@pytest.mark.parametrize("page", PAGES)
def test_verbs_exist(page):
    said = set(re.findall(r"luban ([a-z]+)\b", (ROOT / page).read_text()))
    assert said <= set(VERBS), said - set(VERBS)


def test_options_exist():
    """Of verbs that take options of their own; recipes' fields are checked where recipes are."""
    sources = {verb: (ROOT / "luban" / "cli" / f"{verb}.py").read_text() for verb in VERBS}
    for line in [*commands("README.md"), *commands("README.zh.md"), *commands("docs/ADAPTERS.md")]:
        if line.startswith("luban "):
            verb = line.split()[1]
            for option in re.findall(r"--([a-z-]+)(?![\w.-])", line):
                known = option in ("out", "init", "dry-run") or re.search(
                    rf"\b{option.replace('-', '_')}\b", sources[verb]
                )
                assert known, line


def test_both_languages_have_the_same_commands_and_guides():
    assert {*commands("README.md")} <= {*commands("README.zh.md")}
    written = {path.name for path in (ROOT / "docs").glob("[A-Z]*.md")} - {"README.md", "README.zh.md"}
    for page in PAGES[2:]:
        assert set(re.findall(r"\]\(([A-Z_]+\.md)\)", (ROOT / page).read_text())) - {"README.md"} == written
