"""The architecture, as tests: layers, registries, file lengths, and a map that tells the truth."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "luban"
LONG_FILES: set[str] = set()  # files allowed past 400 lines; this set only shrinks


def test_a_package_imports_only_from_lower_lines():
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_package_is_in_the_contract():
    contract = (ROOT / "pyproject.toml").read_text()
    layers = re.search(r"layers = \[(.*?)\]", contract, re.S).group(1)
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == set(re.findall(r"[a-z_]+", layers))


def test_registries_name_modules_of_their_own_package_only():
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0]
        if package.endswith(".py") or package == "cli":
            continue  # the package's public names and the verb table may name any package
        for target in re.findall(r'"luban\.([a-z_]+)[\w.]*:\w+"', path.read_text()):
            assert target == package, f"{path} registers something of {target}"


def test_files_stay_short_and_say_what_they_are():
    for path in PACKAGE.rglob("*.py"):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        assert len(text.splitlines()) <= 400 or name in LONG_FILES, f"{name} is too long"
        assert not text or text.lstrip().startswith('"""'), f"{name} has no docstring"
    assert all(len((ROOT / name).read_text().splitlines()) > 400 for name in LONG_FILES)


def test_the_formatter_lays_out_everything_but_kernels_of_forty_parameters():
    skipped = {
        path.relative_to(ROOT).as_posix()
        for folder in ("luban", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__) and re.search(r"# fmt: (skip|off)", path.read_text())
    }
    kernels = {"flash/forward.py", "flash/backward.py", "paged.py"}
    assert skipped <= {f"luban/kernels/{name}" for name in kernels}


def test_every_path_in_the_map_exists():
    text = (ROOT / "docs" / "MAP.md").read_text()
    paths = set(re.findall(r"`((?:luban|tests|benchmarks|docs)/[\w./-]+)`", text))
    assert paths, "the map names no path"
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_no_script_is_named_like_a_module_of_python():
    """A script's folder comes first on the path of what it starts, where `encodings.py` kept Python itself from starting and
    torch from generating vectorised code."""
    scripts = [path for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert scripts and not [path for path in scripts if path.stem in sys.stdlib_module_names]


def test_every_file_of_tests_has_a_name_of_its_own():
    """pytest imports them by name alone, and refuses the second."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
