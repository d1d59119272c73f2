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


def saved_parameters(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """The parameters that are trained whole beside an adapter.

    Args:
        names: each a role ("embedding", "lm_head", "norm": all parameters of the modules that own one of this role; "bias":
            biases alone), or a pattern of the names of modules or of single parameters.

    Raises:
        ConfigError: a name that matches nothing.
    """
    owners = [
        (name, dict(module.named_parameters(recurse=False)), declared_roles(module))
        for name, module in model.named_modules()
    ]
    owners = [(name, held, roles) for name, held, roles in owners if held]
    found: list[nn.Parameter] = []
    for wanted in names:
        whole = [
            parameter
            for name, held, roles in owners
            if wanted in set(roles.values()) - {"bias"} or fnmatchcase(name, wanted) or name.split(".")[0] == wanted
            for parameter in held.values()
        ]
        matches = whole or [
            parameter
            for name, held, roles in owners
            for own, parameter in held.items()
            if (wanted == "bias" and roles.get(own) == "bias") or fnmatchcase(f"{name}.{own}", wanted)
        ]
        if not matches:
            roles = sorted({role for _, held, roles in owners for own, role in roles.items() if own in held})
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
