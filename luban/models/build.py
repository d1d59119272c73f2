"""From a specification to a module."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from luban.core.errors import ConfigError, nearest
from luban.models.base import Model
from luban.models.spec import ModelSpec
from luban.nn.init import initialise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def build_model(
    spec: ModelSpec, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32", seed: int | None = 0
) -> Model:
    """The module of `spec`, its parameters drawn from `seed` and their names.

    Args:
        device: where its parameters live; "meta" allocates nothing.
        dtype: precision of its parameters: float32, bfloat16, float16 or float64.
        seed: of the initialisation; none leaves the parameters unset, for weights that follow.
    """
    with torch.device("meta"):
        model = spec.body.build(spec).to(torch_dtype(dtype))
    if torch.device(device).type == "meta":
        return model
    materialise(model, device)
    if seed is not None:
        initialise(model, spec.init, layers=max(len(spec.layers), 1), seed=seed)
    return model


def materialise(model: nn.Module, device: str | torch.device) -> None:
    """Give a module on the meta device memory on `device`, unset, in place; what was shared stays shared."""
    shared: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shared.setdefault(id(parameter), []).append((module, name))
    model._apply(partial(_unset, device=device))  # as model.to_empty does
    for (first, name), *others in shared.values():
        for module, other in others:
            setattr(module, other, getattr(first, name))


def _unset(like: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """torch.empty_like, which imports sympy on the meta device."""
    if type(like) not in (torch.Tensor, nn.Parameter) or not like.is_contiguous():
        return torch.empty_like(like, device=device)
    return torch.empty(like.shape, dtype=like.dtype, device=device)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, detached; what two modules share is named once."""
    state = model.state_dict(keep_vars=True)  # first: here FSDP puts shards in the place of gathered parameters
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    known = {id(parameter) for parameter in model.parameters()}
    for name, tensor in state.items():
        if id(tensor) not in known:
            found[name] = tensor.detach()
    return found


def shared_names(model: nn.Module) -> dict[str, str]:
    """Parameters that several modules share: every further name → the first, under which `state_of` has them."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: known for name, parameter in named if (known := first.setdefault(id(parameter), name)) != name}


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch precision of this name, or itself. Raises ConfigError naming those there are."""
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"unknown precision '{name}'{nearest(name, DTYPES)}")
    return DTYPES[name]
