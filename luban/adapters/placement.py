"""Which projections of a model get an adapter: chosen by role, or by patterns of their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from luban.core.errors import ConfigError, closest, nearest
from luban.nn.linear import MatmulOwner, Projection, matmul_owners
from luban.nn.roles import declared_roles


@dataclass(frozen=True)
class Place:
    """A projection of a model."""

    name: str  # qualified, such as decoder.blocks.0.mixer.qkv.q
    owner: MatmulOwner
    projection: str  # its name in the owner

    @property
    def target(self) -> Projection:
        """The projection itself."""
        return self.owner.projections()[self.projection]

    @property
    def role(self) -> str:
        """Of the weight."""
        return self.target.parameter_roles["weight"]


def places_of(model: nn.Module) -> list[Place]:
    """Every projection of a model, in order."""
    return [
        Place(name if own == "weight" else f"{name}.{own}", owner, own)
        for name, owner in matmul_owners(model)
        for own in owner.projections()
    ]


def chosen_places(model: nn.Module, targets: Sequence[str], *, given: bool = True) -> list[Place]:
    """The projections that `targets` names, each a role or a pattern of names (`*`, `?`, `[…]`).

    Args:
        given: each target must match something; else the model needn't have all of them (a default list).

    Raises:
        ConfigError: a target that matches nothing; the roles there are, or the nearest, are named.
    """
    every = places_of(model)
    found: dict[str, Place] = {}
    for target in targets:
        matches = [place for place in every if place.role == target or fnmatchcase(place.name, target)]
        if not matches and given:
            raise ConfigError(_no_match(target, every))
        found |= {place.name: place for place in matches}
    if not found:
        raise ConfigError(f"no projection has one of the roles {', '.join(targets)}: {_roles(every)}")
    return [place for place in every if place.name in found]


def saved_modules(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules that own the parameters of these roles ("embedding", "lm_head", "norm") or match these patterns of names.

    Raises:
        ConfigError: a name that matches nothing.
    """
    owners = [
        (name, module, frozenset(declared_roles(module).values()))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    found: list[nn.Module] = []
    for wanted in names:
        matches = [
            m for n, m, roles in owners if wanted in roles or fnmatchcase(n, wanted) or n.split(".")[0] == wanted
        ]
        if not matches:
            roles = sorted({role for _, _, held in owners for role in held})
            raise ConfigError(f"adapter.modules_to_save '{wanted}' matches nothing{nearest(wanted, roles)}")
        found += matches
    return found


def _no_match(target: str, every: Sequence[Place]) -> str:
    if target in ("expert", "router", "embedding"):
        return f"adapter target '{target}': weights of this role take no adapter; {_roles(every)}"
    hint = closest(target, (place.role for place in every)) if not set(target) & set("*?[.") else ""
    return f"adapter target '{target}' matches no projection of this model{hint}; {_roles(every)}"


def _roles(every: Sequence[Place]) -> str:
    roles = dict.fromkeys(place.role for place in every)
    return f"its projections have the roles {', '.join(roles)}"
