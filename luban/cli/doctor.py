"""`luban doctor`: what this machine has, what is missing, and what that costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luban.core.arguments import parse
from luban.core.artifact import free_bytes
from luban.core.units import bytes_

EXTRAS = {
    "pyarrow": ("corpus", "Parquet corpora"),
    "fastapi": ("serve", "luban serve"),
    "uvicorn": ("serve", "luban serve"),
    "llguidance": ("serve", "structured output"),
    "prometheus_client": ("serve", "luban serve"),
    "tensorboard": ("tensorboard", "TensorBoard logs"),
    "scipy": ("scaling", "luban scaling"),
    "sqlglot": ("sql", "luban sql"),
    "duckdb": ("sql", "luban sql on DuckDB files"),
}


@dataclass(frozen=True)
class Args:
    """Options: none."""


def run(argv: Sequence[str]) -> int:
    """Print one line a finding; exit code 1 when something that Luban cannot do without is missing."""
    parse(Args, argv, verb="doctor", about="What this machine has and what is missing.", examples="luban doctor")
    findings = [_python(), *_torch(), _compiler(), _memory(), *_extras()]
    for good, line in findings:
        print(f"{'✓' if good else '✗' if good is False else '·'} {line}")
    return int(any(good is False for good, _ in findings))


Finding = tuple[bool | None, str]  # true: there; false: needed and missing; none: optional and missing


def _python() -> Finding:
    return True, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"


def _torch() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return [(False, "torch is missing: pip install 'torch>=2.11'")]
    flags = torch.backends.cpu.get_cpu_capability()
    found: list[Finding] = [(True, f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU {flags}")]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append((True, f"GPU {index}: {card.name}, {bytes_(card.total_memory)}"))
    if not torch.cuda.is_available():
        found.append((None, "no CUDA GPU: everything runs on the CPU, at small sizes"))
    return found


def _compiler() -> Finding:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler and header.exists():
        return True, f"C++ compiler {compiler} and Python's headers: training is compiled"
    missing = "C++ compiler" if not compiler else "Python headers (python3-dev)"
    return None, f"no {missing}: training runs uncompiled, about half as fast"


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return True, f"{os.cpu_count()} cores, {bytes_(total)} memory, {bytes_(free_bytes('.'))} free on this disk"


def _extras() -> list[Finding]:
    findings: list[Finding] = []
    for package, (extra, use) in EXTRAS.items():
        if importlib.util.find_spec(package):
            findings.append((True, f"{package} {importlib.metadata.version(package)}: {use}"))
        else:
            findings.append((None, f"{package} is not installed ({use}): pip install 'luban[{extra}]'"))
    return findings
