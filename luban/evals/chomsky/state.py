"""A training on one task that goes on in another process with the same bits: parameters, Adam's moments, random numbers.

One safetensors file, replaced as a whole, whose metadata are the step, the seconds so far, whether training is over, and the
protocol.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError

FILE = "training.safetensors"
LIMITS = ("steps", "seconds")  # fields of a protocol that may change when training goes on


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    seconds: float = 0.0  # spent in training, all processes together
    learned: bool = False  # it ended because the model was good enough


def refuse_other(kept: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError where a folder's protocol differs from the one asked for in more than steps and seconds."""
    names = [name for name in asked | kept if name not in LIMITS and kept.get(name) != asked.get(name)]
    if names:
        told = ", ".join(f"{name} {kept.get(name)} (now {asked.get(name)})" for name in names)
        raise ConfigError(f"{folder} was trained with {told}: give another folder, or the same settings")


def save_state(
    folder: Path,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    progress: Progress,
    protocol: dict[str, Any],
) -> None:
    """Write FILE in `folder`."""
    from safetensors.torch import save_file

    tensors = {f"parameter.{i}": parameter.detach() for i, parameter in enumerate(parameters)}
    for i, parameter in enumerate(parameters):
        tensors |= {f"optimizer.{i}.{name}": value for name, value in optimizer.state[parameter].items()}
    tensors["random.cpu"] = torch.get_rng_state()
    device = parameters[0].device
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    told = {"progress": vars(progress), "random": rng.bit_generator.state, "protocol": protocol}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / f"{FILE}.incomplete",
        {"state": json.dumps(told)},
    )
    os.replace(folder / f"{FILE}.incomplete", folder / FILE)


@torch.no_grad()
def load_state(
    folder: Path,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    protocol: dict[str, Any],
) -> Progress:
    """Restore what `save_state` wrote; a folder without it gives the beginning.

    Raises:
        ConfigError: the folder's training has another protocol.
    """
    from safetensors import safe_open

    if not (folder / FILE).is_file():
        return Progress()
    with safe_open(folder / FILE, "pt") as file:
        told = json.loads(file.metadata()["state"])
        refuse_other(told["protocol"], protocol, folder)
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    device = parameters[0].device
    for i, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"parameter.{i}"])
        start = f"optimizer.{i}."
        optimizer.state[parameter] = {
            name.removeprefix(start): value if name == f"{start}step" else value.to(device)
            for name, value in tensors.items()
            if name.startswith(start)
        }
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    rng.bit_generator.state = told["random"]
    return Progress(**told["progress"])
