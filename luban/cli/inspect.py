"""`luban inspect ARTIFACT|MODEL`: kind, lineage and metrics of an artifact, or the specification of a foreign model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from luban.core.arguments import parse
from luban.core.artifact import MANIFEST, Manifest, Parent, open_artifact, read_manifest
from luban.core.errors import UsageError
from luban.core.units import bytes_
from luban.core.whole_directory import incomplete_path


@dataclass(frozen=True)
class Args:
    """Options."""

    artifact: Positional[Path]  # an artifact directory, a Hugging Face directory, a GGUF file, or smollm2
    json: bool = False  # print the manifest, or a foreign model's description, as JSON
    verify: bool = False  # hash every file and compare


def run(argv: Sequence[str]) -> None:
    """Print an artifact's manifest as text or JSON."""
    args = parse(
        Args,
        argv,
        verb="inspect",
        about="An artifact's kind, files, metrics and lineage.",
        examples="luban inspect runs/demo/sft\nluban inspect runs/demo/shards --json --verify\n"
        "luban inspect model.gguf",
    )
    path = args.artifact
    if not (path / MANIFEST).is_file() and (incomplete_path(path) / MANIFEST).is_file():
        path = incomplete_path(path)
    if not (path / MANIFEST).is_file() and is_foreign(path):
        if args.verify:
            raise UsageError(
                f"{path} has no manifest, so --verify has nothing to check; `luban import` makes a checkpoint with one"
            )
        known = foreign_model(path)
        print(json.dumps(known, indent=2, ensure_ascii=False) if args.json else "\n".join(model_lines(known)))
        return
    manifest = open_artifact(path) if args.verify else read_manifest(path)
    if args.json:
        figures = {k: manifest.figures[k] for k in ("weights_hash",) if k in manifest.figures}
        print(json.dumps({**manifest.to_json(), **figures}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(describe(path, manifest, args.verify)))


def is_foreign(path: Path) -> bool:
    """True if this is a model from another library."""
    from luban.load.packaged import PACKAGED
    from luban.models.convert.gguf_file import is_gguf

    named = str(path) in PACKAGED and not path.exists()
    return named or (path / "config.json").is_file() or is_gguf(path)


def foreign_model(path: Path) -> dict[str, Any]:
    """Description of a foreign model, which is loaded for it."""
    from luban.checkpoint.weights import weights_hash
    from luban.core.config import to_dict
    from luban.load.model import load_model

    m = load_model(path)
    tokenizer = m.tokenizer
    tokens = (
        {
            "vocab_size": tokenizer.vocab_size,
            "stop": [tokenizer.token(i) for i in m.stop_ids],
            "begins_with_bos": m.begins_with_bos,
            "chat_template": tokenizer.chat_template is not None,
        }
        if tokenizer
        else None
    )
    return {
        "kind": "model",
        "name": m.name,
        "path": str(m.path),
        "parameters": m.spec.parameters,
        "context": m.spec.context,
        "weights_hash": weights_hash(dict(m.module.named_parameters())),
        "tokenizer": tokens,
        "labels": list(m.labels),
        "unread": list(m.unread),
        "spec": to_dict(m.spec),
    }


def model_lines(known: dict[str, Any]) -> list[str]:
    """The description as lines of text."""
    tables = {title: known[title] or {} for title in ("tokenizer", "spec")}
    lines = [
        f"{known['path']}: model {known['name']}",
        f"  parameters    {known['parameters']:,}",
        f"  context       {known['context']:,} tokens",
        f"  weights hash  {known['weights_hash']}",
        *([f"  classes       {', '.join(known['labels'])}"] if known["labels"] else []),
        *([f"  not read      {', '.join(known['unread'])}"] if known["unread"] else []),
    ]
    for title, table in tables.items():
        lines += [f"  {title}" if table else f"  {title:<13} none"]
        lines += [f"    {key:<24} {_short(value)}" for key, value in table.items()]
    return lines


def describe(path: Path, manifest: Manifest, verified: bool) -> list[str]:
    """The manifest as lines of text."""
    sized = [entry["bytes"] for entry in manifest.files.values() if entry]
    lines = [
        f"{path}: {manifest.kind} (format {manifest.format}), {manifest.status}, made {manifest.created}",
        f"  content hash  {manifest.content_hash or '—'}{'  verified' if verified else ''}",
        f"  files         {len(manifest.files)}, {bytes_(sum(sized))}",
        f"  seed          {manifest.seed}",
        f"  versions      {', '.join(f'{k} {v}' for k, v in sorted(manifest.versions.items()))}",
    ]
    for title, table in (("config", manifest.config), ("settings", manifest.settings), ("figures", manifest.figures)):
        lines += [f"  {title}"] * bool(table) + [
            f"    {key:<24} {_short(value)}" for key, value in sorted(table.items())
        ]
    return [*lines, "  lineage", f"    {path.resolve().name} ({manifest.kind})", *tree(manifest.parents, "    ")]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 110 else text[:107] + "…"


def tree(parents: Sequence[Parent], indent: str, shown: set[str] | None = None) -> list[str]:
    """The ancestors as an indented tree. A shared ancestor is expanded once.

    Args:
        shown: content hashes of ancestors that are expanded already.
    """
    lines, shown = [], set() if shown is None else shown
    for index, parent in enumerate(parents):
        last, again = index == len(parents) - 1, parent.content_hash in shown and bool(parent.parents)
        lines.append(
            f"{indent}{'└─' if last else '├─'} {parent.role}: {parent.name} ({parent.kind} {parent.content_hash[:12]})"
            f"{', as above' if again else ''}"
        )
        shown.add(parent.content_hash)
        if not again:
            lines += tree(parent.parents, indent + ("   " if last else "│  "), shown)
    return lines
