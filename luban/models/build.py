"""From a specification to a module."""

from __future__ import annotations

import torch
from torch import nn

from luban.core.errors import ConfigError, nearest
from luban.models.spec import ModelSpec
from luban.nn.init import initialise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def build_model(spec: ModelSpec, *, device: str | torch.device = "cpu", dtype: str = "float32",
                seed: int | None = 0) -> nn.Module:  # fmt: skip
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
    model.to_empty(device=device)
    if seed is not None:
        initialise(model, spec.init, layers=spec.layers, seed=seed)
    return model


def torch_dtype(name: str) -> torch.dtype:
    """The torch precision of this name. Raises ConfigError naming those there are."""
    if name not in DTYPES:
        raise ConfigError(f"unknown precision '{name}'{nearest(name, DTYPES)}")
    return DTYPES[name]
