"""Every artifact is a directory with a `manifest.json` that knows its parents.

A directory is written as `NAME.incomplete` and renamed when whole, so that nothing that passes for
finished is half-written. The content hash covers kind, format version, configuration, seed, the bytes
of every file and the parents' content hashes; it leaves out times, figures and host facts.
"""

from __future__ import annotations

import fcntl
import fnmatch
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from luban.core.errors import ArtifactError, DataError, LineageError, UnsupportedError, UsageError, problem
from luban.core.hashing import data_sha256, file_sha256, finite
from luban.core.resuming import differences, require_resumable
from luban.core.whole_directory import incomplete_path, put_in_place, real_path

MANIFEST = "manifest.json"
LOCK = ".lock"
REFUSALS = (UsageError, DataError, LineageError, UnsupportedError)  # input that no second try makes right
VERSIONED = ("luban", "torch", "numpy", "tokenizers", "safetensors", "pyarrow", "triton")


@dataclass(frozen=True, kw_only=True)
class Parent:
    """An ancestor as its child remembers it, with its own ancestors, so that a tree needs no other file."""

    role: str  # what it was to the child: corpus, tokenizer, shards, init, model
    kind: str  # the parent's kind
    content_hash: str  # the parent's content hash
    name: str  # the parent's directory name, for people
    parents: tuple[Parent, ...] = ()  # the parent's own parents
    terms: tuple[str, ...] = ()  # licences under which the parent's own content stands


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Kind, configuration, files and parents of an artifact directory."""

    kind: str  # corpus, tokenizer, shards, checkpoint, run, evaluation, demo, …
    format: int = 1  # version of the layout of this kind
    config: dict[str, Any] = field(default_factory=dict)  # the configuration that defines it
    seed: int | None = None  # the seed that made it
    parents: tuple[Parent, ...] = ()  # what it was made from
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # relative path → bytes, sha256 (volatile: neither)
    content_hash: str = ""  # over everything above
    figures: dict[str, Any] = field(default_factory=dict)  # what was measured; not hashed
    status: str = "finished"  # finished, or unfinished inside an .incomplete directory
    versions: dict[str, str] = field(default_factory=dict)  # package versions that made it
    created: str = ""  # UTC time, ISO 8601
    terms: tuple[str, ...] = ()  # licences of its own content; those of its parents bind it too
    settings: dict[str, Any] = field(default_factory=dict)  # the configuration that doesn't define it; not hashed

    def compute_hash(self) -> str:
        """The content hash of these fields."""
        terms = {"terms": sorted(self.terms)} if self.terms else {}
        return data_sha256(
            terms
            | {
                "kind": self.kind,
                "format": self.format,
                "config": self.config,
                "seed": self.seed,
                "files": {name: entry["sha256"] for name, entry in self.files.items() if "sha256" in entry},
                "parents": sorted((p.role, p.content_hash) for p in self.parents),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, as written to disk."""
        return asdict(self)

    def parent(self, role: str) -> Parent | None:
        """The direct parent with this role."""
        return next((p for p in self.parents if p.role == role), None)


def _parent_from(data: dict[str, Any]) -> Parent:
    parents = tuple(_parent_from(p) for p in data.get("parents", ()))
    return Parent(**{**data, "parents": parents, "terms": tuple(data.get("terms", ()))})


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape an artifact, and of Python."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the artifact at `path`, its own hash checked.

    Raises ArtifactError where there is none, it is unfinished, or it was edited.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        if incomplete_path(path).is_dir():
            raise ArtifactError(f"{path} is unfinished: run the command that makes it again to resume")
        if not path.exists():
            raise ArtifactError(f"{path} does not exist")
        raise ArtifactError(f"{path} is not a Luban artifact: it holds no {MANIFEST}")
    try:
        data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        parents, terms = tuple(_parent_from(p) for p in data["parents"]), tuple(data.get("terms", ()))
        manifest = Manifest(**{**data, "parents": parents, "terms": terms})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path / MANIFEST} is damaged: {problem(error)}") from error
    if manifest.status == "finished" and manifest.compute_hash() != manifest.content_hash:
        raise ArtifactError(f"{path / MANIFEST} was edited: its content hash does not fit its fields")
    return manifest


def _with_article(kind: str) -> str:
    """index → an index, run → a run; shards stay as they are."""
    return kind if kind.endswith("s") and kind != "corpus" else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def open_artifact(
    path: str | Path, kind: str | tuple[str, ...] | None = None, *, verify: bool | Collection[str] = True
) -> Manifest:
    """Read and check a finished artifact: its kind, and the size and hash of every file.

    Args:
        verify: hash the files, or those named. False for what is too large to be read whole whenever it is opened: corpora
            and shards.

    Raises:
        ArtifactError: names the file that is missing, truncated or changed.
    """
    path, manifest = Path(path), read_manifest(path)
    kinds = (kind,) if isinstance(kind, str) else kind
    if kinds and manifest.kind not in kinds:
        raise ArtifactError(
            f"{path} holds {_with_article(manifest.kind)}; needed here: {' or '.join(map(_with_article, kinds))}"
        )
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{path} is damaged: {name} is missing")
        if not entry:
            continue  # volatile: a log, free to grow
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise ArtifactError(f"{path} is damaged: {name} has {size} bytes, its manifest says {entry['bytes']}")
        hashed = verify if isinstance(verify, bool) else name in verify
        if hashed and file_sha256(file) != entry["sha256"]:
            raise ArtifactError(f"{path} is damaged: the content of {name} does not match its manifest")
    return manifest


def as_parent(role: str, path: str | Path) -> Parent:
    """The artifact at `path`, as its child will remember it."""
    manifest = read_manifest(path)
    return Parent(
        role=role,
        kind=manifest.kind,
        content_hash=manifest.content_hash,
        name=Path(path).resolve().name,
        parents=manifest.parents,
        terms=manifest.terms,
    )


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file whole or not at all, durable after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON, atomically; NaN and infinities as null."""
    atomic_write(path, json.dumps(finite(data), indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n")


def read_table(file: Path) -> dict[str, Any]:
    """The JSON table in a file. Raises ArtifactError where it holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{file} holds no table")
    return found


class ArtifactWriter:
    """Writes one artifact: `with ArtifactWriter(out, kind=…) as art: (art.path / "x").write_bytes(…)`.

    Leaving the block normally hashes every file, writes the manifest and renames the directory into
    place. Leaving it by an exception removes what was written, unless `resumable`, in which case the
    `.incomplete` directory stays for the next call with the same identity.

    Args:
        out: the directory to make. Refused when it exists and is not empty.
        kind, config, parents, seed, format: the artifact's identity.
        settings: configuration that is no part of the identity, such as logging.
        resumable: keep and reuse an unfinished directory of the same identity; refuse another's. One that was
            refused for its input before anything was resumed is removed all the same.
        extensible: dotted paths in `config` that may differ from what is resumed; a finished artifact that differs in
            no other field is taken up again.
        volatile: glob patterns of files that hold times or logs; the manifest lists them, no hash covers them.

    Raises:
        ArtifactError: `out` is not UTF-8, holds something finished or foreign, an unfinished artifact of another
            configuration, or one that another process is writing.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        kind: str,
        config: dict[str, Any] | None = None,
        parents: tuple[Parent, ...] = (),
        seed: int | None = None,
        format: int = 1,
        settings: dict[str, Any] | None = None,
        resumable: bool = False,
        extensible: Collection[str] = (),
        volatile: tuple[str, ...] = (),
    ):
        self.out = real_path(out)
        # manifests of artifacts inside this one are excluded from the content hash, because they record times
        self.volatile: tuple[str, ...] = (f"*/{MANIFEST}", *volatile)
        self.path = incomplete_path(self.out)
        self.resumable, self.extensible = resumable, frozenset(extensible)
        self.resumed = False  # true when an unfinished directory of the same identity was found
        self.changed: dict[str, tuple[Any, Any]] = {}  # (old, new) of extensible fields and settings, by path
        self.figures: dict[str, Any] = {}
        self.terms: tuple[str, ...] = ()  # licences of the content, known when it is whole
        self.hashes: dict[str, str] = {}  # SHA-256 of files that their writer has hashed and put on the disk already
        self.manifest = Manifest(
            kind=kind,
            format=format,
            config=json.loads(json.dumps(config or {})),  # the same plain data that reading gives back
            settings=json.loads(json.dumps(settings or {})),
            seed=seed,
            parents=tuple(parents),
            status="unfinished",
            versions=package_versions(),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def finished(self) -> bool:
        """True if `out` already holds the finished artifact of the same identity.

        Raises ArtifactError if it holds one of another identity that can't be extended to this one.
        """
        if not (self.out / MANIFEST).is_file():
            return False
        found = read_manifest(self.out)
        require_resumable(found, self.manifest, self.out, self.extensible, "choose another --out, or remove it")
        return found.config == self.manifest.config

    def __enter__(self) -> ArtifactWriter:
        if self.extensible and (self.out / MANIFEST).is_file() and not self.finished():
            if self.path.exists():
                raise ArtifactError(
                    f"{self.out} is finished, and {self.path} stands beside it: remove the latter first"
                )
            os.rename(self.out, self.path)  # to be extended
        self._refuse_occupied()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(exist_ok=True)
        self._lock = open(self.path / LOCK, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ArtifactError(f"{self.out} is being written by another process") from None
        try:
            if self.resumable and (self.path / MANIFEST).is_file():
                self._adopt()
            else:
                self._clear()
                write_json(self.path / MANIFEST, self.manifest.to_json())
        except BaseException:
            self._lock.close()
            raise
        return self

    def _refuse_occupied(self) -> None:
        try:
            str(self.out).encode()
        except UnicodeEncodeError:  # pyarrow and safetensors take no other paths
            raise ArtifactError(f"{str(self.out)!a} is no path in UTF-8: choose another --out") from None
        if self.out.is_dir() and any(self.out.iterdir()):
            if (self.out / MANIFEST).is_file():
                kind = read_manifest(self.out).kind
                raise ArtifactError(f"{self.out} already holds a finished {kind}: choose another --out, or remove it")
            raise ArtifactError(f"{self.out} is not empty and holds nothing of Luban's: choose another --out")
        if self.out.exists() and not self.out.is_dir():
            raise ArtifactError(f"{self.out} is a file: --out must name a directory")
        if self.out.exists() and (self.out.samefile(".") or os.path.ismount(self.out)):  # neither can be renamed onto
            what = "a mount point" if os.path.ismount(self.out) else "the working directory"
            raise ArtifactError(f"{self.out} is {what}, which can't be replaced: name a directory inside it")

    def _adopt(self) -> None:
        found = read_manifest(self.path)
        require_resumable(found, self.manifest, self.path, self.extensible, "use the same one, or remove it")
        old, new = ({**m.config, "settings": m.settings} for m in (found, self.manifest))
        changes = differences(old, new)
        self.changed = {path.removeprefix("settings."): (was, now) for path, was, now in changes}
        self.resumed, self.figures = True, dict(found.figures)

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def note(self, **figures: Any) -> None:
        """Record measured figures, and write them through so that an interrupted artifact keeps them."""
        self.figures.update(figures)
        write_json(self.path / MANIFEST, replace(self.manifest, figures=self.figures).to_json())

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                self._finish()
            elif not self.resumable or (isinstance(error, REFUSALS) and not self.resumed):
                shutil.rmtree(self.path, ignore_errors=True)
        finally:
            self._lock.close()

    def _finish(self) -> None:
        (self.path / LOCK).unlink()
        files = {}
        for file in sorted(self.path.rglob("*")):
            relative = file.relative_to(self.path).as_posix()
            if file.is_file() and relative != MANIFEST:
                if any(fnmatch.fnmatch(relative, pattern) for pattern in self.volatile):
                    files[relative] = {}
                    continue
                known = self.hashes.get(relative)
                if known is None:
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
                files[relative] = {"bytes": file.stat().st_size, "sha256": known or file_sha256(file)}
        done = replace(self.manifest, files=files, figures=self.figures, status="finished", terms=self.terms)
        self.manifest = replace(done, content_hash=done.compute_hash())
        write_json(self.path / MANIFEST, self.manifest.to_json())
        put_in_place(self.path, self.out)


def free_bytes(path: str | Path) -> int:
    """Bytes free on the disk that will hold `path`."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_free(path: str | Path, needed: int, what: str) -> None:
    """Refuse before writing when the disk cannot hold it. Raises DataError with both sizes."""
    free = free_bytes(path)
    if free < needed:
        raise DataError(f"{what} needs about {needed / 1e6:.0f} MB at {path}, and only {free / 1e6:.0f} MB are free")


def command_line() -> str:
    """The command that is running, for people who read a run later."""
    return " ".join(["luban", *sys.argv[1:]])
