"""A model with an adapter: from a run of adapters or a PEFT directory, over the base that it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luban.adapters.base import AdapterConfig
from luban.adapters.peft.layout import Names, PeftFiles, layout_of
from luban.adapters.peft.tasks import spec_under
from luban.checkpoint.reader import CheckpointReader
from luban.checkpoint.weights import weights_hash
from luban.core.artifact import MANIFEST, Manifest, read_manifest, read_table
from luban.core.config import from_dict
from luban.core.errors import ArtifactError, LineageError
from luban.core.whole_directory import incomplete_path
from luban.load.tensors import read_tensors
from luban.models.base import Model
from luban.models.build import build_model, state_of
from luban.models.convert.base import Format, format_for, format_of
from luban.models.spec import ModelSpec, read_spec
from luban.nn.linear import store_column_major
from luban.nn.packed import KINDS

if TYPE_CHECKING:
    from luban.load.model import LoadedModel

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base.json"  # beside them: the weights_hash of the model under the adapter and how it is kept, which PEFT has no field for


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """An adapter on disk, found but not yet put into a model."""

    path: Path
    config: AdapterConfig | None = None  # None: PEFT's, whose meaning depends on the model
    tensors: Mapping[str, Tensor] | PeftFiles
    base: str = ""  # the model that it was trained over, as the run knew it
    base_weights: str = ""  # that model's weights_hash; empty: not known
    packed: Literal["float", "int8", "nf4"] = (
        "float"  # how a PEFT directory says that the base was kept (`AdapterConfig.base`)
    )
    manifest: Manifest | None = None  # of the run or checkpoint
    spec: ModelSpec | None = None  # of the run's model, whose head may be another than the base's
    home: Path | None = None  # the run with its tokenizer


@dataclass(frozen=True)
class ActiveAdapter:
    """The adapter in a loaded model."""

    config: AdapterConfig
    base: str  # the model under it, as it was called
    base_weights: str  # its weights_hash
    weights: str = ""  # the adapter's own; empty: it is none that was loaded


def base_reference(model: str) -> str:
    """How a run remembers the model that it adapts: a path from the root where it is one."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def is_adapter(path: Path) -> bool:
    """True for a run or checkpoint of adapters and for a PEFT directory."""
    if (path / PEFT_CONFIG).is_file():
        return True
    place = path if (path / MANIFEST).is_file() else incomplete_path(path)
    return (place / MANIFEST).is_file() and bool(read_manifest(place).config.get("adapter"))


def find_adapter(path: Path) -> StoredAdapter:
    """Open what is at `path`; of an unfinished run its last checkpoint, with a warning. Raises ArtifactError where it holds no
    adapter."""
    if (path / PEFT_CONFIG).is_file():
        config = read_table(path / PEFT_CONFIG)
        if not (path / PEFT_WEIGHTS).is_file():
            raise ArtifactError(f"{path} holds {PEFT_CONFIG} without {PEFT_WEIGHTS}")
        files = PeftFiles(config, read_tensors(path / PEFT_WEIGHTS))
        base = config.get("base_model_name_or_path") or ""
        known = read_table(path / BASE) if (path / BASE).is_file() else {}
        weights = str(known.get("weights_hash", ""))
        return StoredAdapter(path=path, tensors=files, base=base, base_weights=weights, packed=base_kept(path))
    from luban.load.model import chosen_checkpoint

    run = _run_of(path)
    manifest, home = read_manifest(run), run
    if manifest.status != "finished" and not (run / "checkpoints").is_dir():
        raise ArtifactError(f"{path} is unfinished ({run}), and has no checkpoint yet")
    place = chosen_checkpoint(run, manifest) if (run / "checkpoints").is_dir() else run
    if place == run and run.parent.name == "checkpoints":
        home = run.parent.parent
        manifest = read_manifest(home)
    return StoredAdapter(
        path=path,
        config=from_dict(AdapterConfig, manifest.config["adapter"], "adapter"),
        tensors=CheckpointReader.open(place).tensors("model"),
        base=str(manifest.figures.get("base", "")),
        base_weights=str(manifest.config.get("base_weights", "")),
        manifest=manifest,
        spec=read_spec(place),
        home=home,
    )


def base_kept(path: Path) -> Literal["float", "int8", "nf4"]:
    """How the model under the adapter at `path` was kept (`AdapterConfig.base`), without reading the adapter's tensors. Raises
    ArtifactError where there is no adapter."""
    if not (path / PEFT_CONFIG).is_file():
        return from_dict(AdapterConfig, read_manifest(_run_of(path)).config["adapter"], "adapter").base
    packed = read_table(path / BASE).get("base", "float") if (path / BASE).is_file() else "float"
    if packed not in ("float", *KINDS):
        raise ArtifactError(f"{path / BASE} has base = {packed!r}: float or one of {', '.join(KINDS)} is needed")
    return packed


def _run_of(path: Path) -> Path:
    """The run of adapters at `path`, which may be unfinished."""
    run = path if path.is_dir() else incomplete_path(path)
    if not run.is_dir():
        raise ArtifactError(f"{path} does not exist: an adapter is a run of adapters or a PEFT directory")
    if not is_adapter(run):
        raise ArtifactError(f"{path} holds no adapter: neither a run that trained one nor {PEFT_CONFIG}")
    return run


def with_adapter(m: LoadedModel, adapter: StoredAdapter, *, base: str) -> LoadedModel:
    """The model, loaded in float32, with the adapter in it.

    Args:
        base: how the model was called, for messages.

    Raises:
        LineageError: it isn't the model that the adapter was trained over; both hashes are named.
        ArtifactError: the adapter lacks or has other tensors than the model needs.
    """
    found = weights_hash(state_of(m.module))
    require_base(adapter, found, base)
    spec, drawn = spec_with(m, adapter), set()
    if spec.head != m.spec.head:
        m, drawn = under_head(m, spec)
    config, tensors = in_our_names(m, adapter)
    for name in sorted(drawn - tensors.keys()):
        raise ArtifactError(
            f"{adapter.path} lacks the tensor {name} of the head that it was trained under, as does {base}"
        )
    put_in(m.module, config, tensors, adapter.path)
    store_column_major(m.module)
    return replace(m, adapter=ActiveAdapter(config, base, found, weights_hash(tensors)), module=m.module.eval())


def spec_with(m: LoadedModel, adapter: StoredAdapter) -> ModelSpec:
    """The specification of the model with the adapter, whose head may be another than the model's."""
    if isinstance(adapter.tensors, PeftFiles):
        return spec_under(m.spec, format_at(m), adapter.tensors)
    return m.spec if adapter.spec is None else adapter.spec


@torch.no_grad()
def under_head(m: LoadedModel, spec: ModelSpec) -> tuple[LoadedModel, set[str]]:
    """The model with the head of `spec`, and the names of the head's tensors that the model lacks."""
    module, kept, drawn = build_model(spec, seed=0), state_of(m.module), set()
    for name, tensor in state_of(module).items():
        if name in kept and (kept[name].shape == tensor.shape or not name.startswith("head.")):
            tensor.copy_(kept[name])
        else:
            drawn.add(name)
    return replace(m, spec=spec, module=module), drawn


def require_base(adapter: StoredAdapter, found: str, base: str) -> None:
    """Raise LineageError unless `base`, whose weights have the hash `found`, is what the adapter was trained over."""
    if adapter.base_weights and adapter.base_weights != found:
        raise LineageError(
            f"{adapter.path} was trained over a model with weights_hash {adapter.base_weights}, and {base} has {found}: "
            f"give the model that it was trained over{f', {adapter.base}' if adapter.base else ''}"
        )


def in_our_names(m: LoadedModel, adapter: StoredAdapter) -> tuple[AdapterConfig, Mapping[str, Tensor]]:
    """The adapter's config and tensors, named as in the adapted model."""
    if not isinstance(adapter.tensors, PeftFiles):
        assert adapter.config is not None
        return adapter.config, adapter.tensors
    kind = str(adapter.tensors.config.get("peft_type"))
    ours = layout_of(kind, str(adapter.path)).read(adapter.tensors, m.module, Names(format_at(m), m.module))
    return replace(ours.config, base=adapter.packed), ours.tensors


def format_at(m: LoadedModel) -> Format:
    """The Hugging Face format that a model came in, else the one that it would be exported in, whose names PEFT uses."""
    config = m.path / "config.json"
    return format_of(read_table(config)) if m.path.is_dir() and config.is_file() else format_for(m.spec)[0]


@torch.no_grad()
def put_in(module: Model, config: AdapterConfig, tensors: Mapping[str, Tensor], source: Any) -> None:
    """Put an adapter's modules with these tensors into a model. Raises ArtifactError where they don't fit."""
    before = {name for name, tensor in state_of(module).items()}
    config.adapt(module)
    state = state_of(module)
    wanted = {name for name, p in module.named_parameters() if p.requires_grad} | (state.keys() - before)
    for name in sorted(wanted - tensors.keys()):
        raise ArtifactError(f"{source} lacks the tensor {name}, which an adapter over this model needs")
    for name in sorted(tensors.keys() - wanted):
        raise ArtifactError(f"{source} holds the tensor {name}, which an adapter over this model has no place for")
    for name in sorted(wanted):
        given = tensors[name]
        if given.shape != state[name].shape:
            shapes = f"{tuple(given.shape)}, the model needs {tuple(state[name].shape)}"
            raise ArtifactError(f"{source}: the tensor {name} has shape {shapes}")
        state[name].copy_(given)
    module.eval()
