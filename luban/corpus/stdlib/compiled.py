"""Docstrings of objects written in C, asked of one subprocess: an allow-list of modules that do nothing on import."""

from __future__ import annotations

import json
import subprocess
import sys

from luban.core.errors import DataError
from luban.corpus.stdlib.scan import Definition, definition_unit

# Module that is imported → the module under which people know its objects.
ALLOWED = {
    "builtins": "builtins",
    "math": "math",
    "cmath": "cmath",
    "itertools": "itertools",
    "time": "time",
    "sys": "sys",
    "posix": "os",
    "nt": "os",
    "array": "array",
    "zlib": "zlib",
    "binascii": "binascii",
    "_struct": "struct",
    "select": "select",
    "gc": "gc",
    "marshal": "marshal",
    "pwd": "pwd",
    "grp": "grp",
    "unicodedata": "unicodedata",
    "fcntl": "fcntl",
    "resource": "resource",
    "_operator": "operator",
    "_functools": "functools",
    "_collections": "collections",
    "_io": "io",
    "_random": "random",
    "_heapq": "heapq",
    "_bisect": "bisect",
    "_datetime": "datetime",
    "_signal": "signal",
    "_socket": "socket",
    "_csv": "csv",
    "_json": "json",
    "_weakref": "weakref",
    "_sre": "re",
    "_bz2": "bz2",
    "_lzma": "lzma",
    "faulthandler": "faulthandler",
    "syslog": "syslog",
    "termios": "termios",
    "mmap": "mmap",
}

SCRIPT = """
import importlib, inspect, json, sys
found = []
def take(module, name, value, kind):
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or not doc.strip(): return
    try: signature = str(inspect.signature(value))
    except Exception: signature = ""  # inspect evaluates defaults, which fails in odd ways
    if " at 0x" not in signature + doc:
        found.append([module, name, kind, signature, inspect.cleandoc(doc)])
for module, public in json.loads(sys.argv[1]).items():
    try: imported = importlib.import_module(module)
    except ImportError: continue
    for name, value in sorted(vars(imported).items()):
        if name.startswith("_"): continue
        if inspect.isbuiltin(value): take(public, name, value, "function")
        elif isinstance(value, type) and value.__module__ in (module, public, "builtins"):
            take(public, name, value, "class")
            for part, member in sorted(vars(value).items()):
                if not part.startswith("_") and (inspect.isroutine(member) or isinstance(member, (classmethod, staticmethod))):
                    take(public, name + "." + part, getattr(value, part), "method")
json.dump(found, sys.stdout)
"""


def scan_compiled() -> list[Definition]:
    """Documented objects of the allow-listed modules, in module and name order.

    Raises:
        DataError: the subprocess fails, with its last words.
    """
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", SCRIPT, json.dumps(ALLOWED)]
    answer = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=60)
    if answer.returncode != 0:
        words = answer.stderr.strip().splitlines()[-1:] or [f"exit code {answer.returncode}"]
        raise DataError(f"the docstrings of {sys.executable}'s compiled modules cannot be read: {words[0]}")
    return [_definition(*entry) for entry in json.loads(answer.stdout)]


def _definition(module: str, name: str, kind: str, signature: str, doc: str) -> Definition:
    for bound in ("($self, /)", "(self, /)"):
        signature = "()" if signature == bound else signature
    for bound in ("($self, /, ", "(self, /, ", "($self, ", "(self, "):
        signature = "(" + signature.removeprefix(bound) if signature.startswith(bound) else signature
    public = name if module == "builtins" else f"{module}.{name}"
    return Definition(
        name=public,
        module=module,
        kind=kind,
        signature=signature,
        doc=doc,
        unit=definition_unit(module, name.split(".")[0]),
    )
