"""Reading tensors and filling modules with them, with an error that names the tensor or file for everything that can be wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luban.checkpoint.reader import StoredTensors
from luban.core.errors import ArtifactError, UnsupportedError, problem
from luban.models.base import Model
from luban.models.build import build_model, materialise, state_of
from luban.models.spec import ModelSpec

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ArtifactError when it is missing, truncated or something else."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ArtifactError(f"{file} does not exist") from None
    except SafetensorError as error:
        raise ArtifactError(f"{file} is truncated or not a safetensors file ({error})") from None


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face directory, in one file or in the shards that its index names.

    Raises ArtifactError: no safetensors (pickled weights are refused, never loaded), an index that names a
    missing shard, a tensor that its shard lacks.
    """
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLED)
    if pickled:
        raise ArtifactError(pickle_refusal(folder / pickled[0]))
    others = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".gguf") and f.is_file())
    if not others:
        raise ArtifactError(f"{folder} holds no {WEIGHTS}")
    way = (
        "load that file itself"
        if others[0].endswith(".gguf")
        else f"one file is called {WEIGHTS}, several need {INDEX}"
    )
    raise ArtifactError(f"{folder} holds no {WEIGHTS}, but {others[0]}: {way}")


def pickle_refusal(file: Path) -> str:
    """Why a pickled file isn't loaded, and the way out."""
    return (
        f"{file} is a pickle, which can run code when it is opened, so it is never loaded: save the model with "
        "save_pretrained(..., safe_serialization=True), or use its model.safetensors"
    )


def _read_shards(folder: Path) -> dict[str, Tensor]:
    try:
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(where.values()))
        if not all(isinstance(name, str) for name in names):
            raise ValueError("its weight_map names files that are no names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder / INDEX} is damaged: {problem(error)}") from None
    tensors: dict[str, Tensor] = {}
    for shard in names:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ArtifactError(f"{folder / INDEX} names the shard {shard}, which is not in {folder}")
        tensors.update(read_tensors(folder / shard))
    missing = sorted(set(where) - set(tensors))
    if missing:
        raise ArtifactError(f"the shard {where[missing[0]]} of {folder} lacks the tensor {missing[0]}")
    return tensors


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def filled(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    source: Path,
    *,
    device: str,
    dtype: str,
    named: Mapping[str, str] | None = None,
) -> Model:
    """The module of `spec` with copies of `tensors` as its parameters, in its own precision and on its device.

    Nothing is allocated before every tensor is known to fit. Raises ArtifactError naming a missing or surplus tensor,
    both shapes of one that doesn't fit, or the kind of one that holds no plain numbers, UnsupportedError naming one whose
    values are too large for `dtype`; `named` says what the file calls a tensor of ours. On the device "meta" nothing is copied.
    """
    module = build_model(spec, device="meta", dtype=dtype)
    described = tensors.described() if isinstance(tensors, StoredTensors) else tensors
    _check(state_of(module), described, source, named or {})
    if device == "meta":
        return module
    materialise(module, device)
    for name, tensor in state_of(module).items():
        given = tensors[name]
        require_fits(given, tensor.copy_(given), f"{source}: the tensor {(named or {}).get(name, name)}")
    return module


def require_fits(given: Tensor, cast: Tensor, what: str) -> None:
    """Raise UnsupportedError unless a tensor's values are finite in the dtype that it was cast to, as far as they were."""
    if cast.dtype != given.dtype and not cast.isfinite().all() and given.isfinite().all():
        name = str(cast.dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"{what} has values up to {given.abs().max().item():.6g}, and {name} holds {torch.finfo(cast.dtype).max:.6g} at "
            "most: use --dtype bfloat16 or float32"
        )


def _check(
    parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path, named: Mapping[str, str]
) -> None:
    for name in parameters.keys() - tensors.keys():
        raise ArtifactError(f"{source} lacks the tensor {named.get(name, name)}")
    for name in tensors.keys() - parameters.keys():
        raise ArtifactError(f"{source} holds the tensor {named.get(name, name)}, which the model has no place for")
    for name, parameter in parameters.items():
        tensor, theirs = tensors[name], named.get(name, name)
        if tensor.shape != parameter.shape:
            called = theirs if theirs == name else f"{theirs} (here {name})"
            raise ArtifactError(
                f"{source}: the tensor {called} has shape {tuple(tensor.shape)}, "
                f"the model needs {tuple(parameter.shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise ArtifactError(
                f"{source}: the tensor {theirs} is stored as "
                f"{str(tensor.dtype).removeprefix('torch.')}: quantised weights aren't read"
            )
