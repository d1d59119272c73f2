"""`luban inspect ARTIFACT`: what a directory is, where it comes from, what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from luban.core.arguments import parse
from luban.core.artifact import MANIFEST, Manifest, Parent, incomplete_path, open_artifact, read_manifest
from luban.core.units import bytes_


@dataclass(frozen=True)
class Args:
    """Options."""

    artifact: Positional[Path]  # an artifact directory
    json: bool = False  # print the manifest as JSON
    verify: bool = False  # hash every file and compare


def run(argv: Sequence[str]) -> None:
    """Print an artifact's manifest, for people or for machines."""
    args = parse(Args, argv, verb="inspect", about="What an artifact is, and its family tree.",
                 examples="luban inspect runs/demo/sft\nluban inspect runs/demo/shards --json --verify")  # fmt: skip
    path = args.artifact
    if not (path / MANIFEST).is_file() and (incomplete_path(path) / MANIFEST).is_file():
        path = incomplete_path(path)
    manifest = open_artifact(path) if args.verify else read_manifest(path)
    if args.json:
        figures = {k: manifest.figures[k] for k in ("weights_hash",) if k in manifest.figures}
        print(json.dumps({**manifest.to_json(), **figures}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(describe(path, manifest, args.verify)))


def describe(path: Path, manifest: Manifest, verified: bool) -> list[str]:
    """The manifest in lines for people."""
    sized = [entry["bytes"] for entry in manifest.files.values() if entry]
    lines = [f"{path}: {manifest.kind} (format {manifest.format}), {manifest.status}, made {manifest.created}",
             f"  content hash  {manifest.content_hash or '—'}{'  verified' if verified else ''}",
             f"  files         {len(manifest.files)}, {bytes_(sum(sized))}",
             f"  seed          {manifest.seed}",
             f"  versions      {', '.join(f'{k} {v}' for k, v in sorted(manifest.versions.items()))}"]  # fmt: skip
    for title, table in (("config", manifest.config), ("figures", manifest.figures)):
        lines += [f"  {title}"] + [f"    {key:<24} {_short(value)}" for key, value in sorted(table.items())]
    return [*lines, "  family", f"    {path.resolve().name} ({manifest.kind})", *tree(manifest.parents, "    ")]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 110 else text[:107] + "…"


def tree(parents: Sequence[Parent], indent: str) -> list[str]:
    """The ancestors as branches."""
    lines = []
    for index, parent in enumerate(parents):
        last = index == len(parents) - 1
        lines.append(
            f"{indent}{'└─' if last else '├─'} {parent.role}: {parent.name} ({parent.kind} {parent.content_hash[:12]})"
        )
        lines += tree(parent.parents, indent + ("   " if last else "│  "))
    return lines
