"""Roles of parameters, declared by the modules that own them.

Optimizers, placements, adapters and the planner read roles, never names.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

Role = Literal[
    "q",
    "k",
    "v",
    "o",  # of attention
    "gate",
    "up",
    "down",  # of a feed-forward network
    "expert",  # matrices of all experts of a mixture, (experts, outputs, inputs)
    "router",  # the matrix that gives a token its experts, kept in float32
    "embedding",  # tables that tokens, segments or positions are looked up in
    "lm_head",  # the output layer of a language model; a tied one is an embedding
    "adapter",  # what is added to the output of a frozen weight
    "dense",  # any other matrix: poolers, classifiers, widening of embeddings, convolutions
    "recurrent",  # matrices of recurrent cells
    "norm",
    "bias",
    "position",  # vectors: scales and shifts, biases, parameters of position methods
]
ROLES: tuple[str, ...] = get_args(Role)
HIDDEN: frozenset[str] = frozenset({"q", "k", "v", "o", "gate", "up", "down"})  # matrices inside Transformer layers
VECTORS: frozenset[str] = frozenset({"norm", "bias", "position"})  # never decayed


def roles_of(module: nn.Module) -> dict[str, Role]:
    """The role of every parameter of `module`, by its qualified name; a shared parameter is named once.

    A module declares the roles of its own parameters in `parameter_roles` (name → role). Raises TypeError for a
    parameter whose owner declares none.
    """
    roles: dict[str, Role] = {}
    for name, _ in module.named_parameters():
        owner, _, own = name.rpartition(".")
        declared = declared_roles(module.get_submodule(owner))
        if own not in declared:
            raise TypeError(f"{type(module.get_submodule(owner)).__name__} declares no role for its parameter '{name}'")
        roles[name] = declared[own]
    return roles


def declared_roles(owner: nn.Module) -> dict[str, Role]:
    """The roles that a module declares for its own parameters, by their names in it; torch's norms and cells declare none."""
    declared = getattr(owner, "parameter_roles", None)
    if declared is not None:
        return declared
    if isinstance(owner, nn.LayerNorm):
        return {"weight": "norm", "bias": "bias"}
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return {name: "bias" if name.startswith("bias") else "recurrent" for name, _ in owner.named_parameters()}
    return {}
