"""The wheel carries what the checkout has: recipes, the chat page, the report's template, the ledger."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel was installed, away from the checkout."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools ≥ 77 builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = folder / "source"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(source)], check=True)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)],
        check=True,
        capture_output=True,
    )
    wheel = next(folder.glob("luban-*.whl"))
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-compile", "--target", str(folder / "site"), str(wheel)], check=True
    )
    return wheel, folder / "site"


def test_data_files_travel(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    tracked = subprocess.run(
        ["git", "ls-files", "luban"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert tracked and not [path for path in tracked if path not in names]


def test_an_installed_luban_finds_its_recipes_page_and_ledger(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed[1])}

    def luban(*words):
        return subprocess.run(
            [sys.executable, "-m", "luban", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    assert "130 rows" in luban("systems").stdout
    assert "tiny_pretrain_cpu" in luban("pretrain", "--help").stdout
    refused = luban("pretrain", "tiny_pretrain_cpu", "--data.path", "nowhere", "--out", "run")
    assert refused.returncode == 1 and "nowhere" in refused.stderr
    where = subprocess.run(
        [sys.executable, "-c", "import luban; print(luban.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert str(installed[1]) in where.stdout
