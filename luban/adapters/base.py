"""Base config of adapters, and what every kind does: freeze the model, put modules beside its weights, train these alone.

I inputs, O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from luban.adapters.placement import Place, chosen_places, saved_modules
from luban.core.errors import UnsupportedError
from luban.core.registry import Registry, Variant
from luban.models.build import build_model, materialise, state_of
from luban.models.spec import ModelSpec
from luban.nn.init import NormalInit, initialise

if TYPE_CHECKING:
    from luban.models.base import Model


class Adapter(nn.Module):
    """Base class of modules that adapters put into a model. Its parameters are trained; buffers are saved with them."""

    rates: Mapping[str, float] = {}  # factors on the learning rate of own parameters, where they aren't 1

    def values_from(self, weights: Mapping[str, Tensor], place: str) -> None:
        """Set what depends on the model's frozen weights; nothing here.

        Args:
            weights: the model's tensors by name.
            place: qualified name of the projection or module that this adapter is at.
        """

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight (O, I) and bias (O,) with the adapter in them. Raises UnsupportedError where no weight expresses it."""
        raise UnsupportedError(f"{type(self).__name__} is no change of a weight, so it can't be merged: export without")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Variant):
    """Base config of adapters (registry `adapter`)."""

    registry: ClassVar[Registry] = Registry(
        "adapter",
        {
            "lora": "luban.adapters.lora:LoRA",
            "dora": "luban.adapters.dora:DoRA",
            "pissa": "luban.adapters.pissa:PiSSA",
            "ia3": "luban.adapters.ia3:IA3",
            "houlsby": "luban.adapters.series:Houlsby",
            "pfeiffer": "luban.adapters.series:Pfeiffer",
            "parallel": "luban.adapters.parallel:Parallel",
            "prompt": "luban.adapters.prompt:PromptTuning",
            "prefix": "luban.adapters.prefix:PrefixTuning",
            "p_tuning_v2": "luban.adapters.prefix:PTuningV2",
            "llama_adapter": "luban.adapters.llama_adapter:LLaMAAdapter",
        },
    )

    peft: ClassVar[str] = ""  # its kind in PEFT; empty: PEFT has none that computes the same
    pages: ClassVar[bool] = True  # the adapted model can be served with keys and values in blocks
    modules_to_save: tuple[str, ...] = ()  # modules trained whole beside the adapter: embedding, lm_head, norm, head

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError or UnsupportedError if the model can't have this adapter."""

    def places(self, model: nn.Module) -> list[Place]:
        """The projections that get an adapter."""
        raise NotImplementedError

    def build(self, place: Place) -> Adapter:
        """The module for a projection."""
        raise NotImplementedError

    def insert(self, model: Model) -> None:
        """Put the modules into the model: by default one at each of `places`."""
        for place in self.places(model):
            place.owner.add_adapter(place.projection, self.build(place))

    def adapt(self, model: Model) -> None:
        """Freeze the model, put the adapters in and let them and `modules_to_save` be trained. The handle that
        `luban.parallel.apply.apply` takes."""
        self.check(model.spec)
        saved = saved_modules(model, self.modules_to_save)
        model.requires_grad_(False)
        like = next(p for p in model.parameters() if p.is_floating_point())
        with torch.device(like.device):
            self.insert(model)
        for _, adapter in adapters_of(model):
            adapter.to(like.dtype)
        for module in saved:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)

    def initial(self, spec: ModelSpec, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The adapters' parameters and buffers before the first step, by name; drawn from the seed and their names, or
        computed from the frozen `weights`. They don't depend on how the run is spread over processes."""
        model = build_model(spec, device="meta")
        named: Mapping[str, Tensor] = _by_every_name(model, weights)
        before = set(state_of(model))
        self.adapt(model)
        for name, adapter in adapters_of(model):
            materialise(adapter, "cpu")
            initialise_adapter(adapter, name, seed)
            with torch.no_grad():
                adapter.values_from(named, place_of(name))
        return {name: tensor.clone() for name, tensor in state_of(model).items() if name not in before}

    def merge(self, model: Model) -> None:
        """Change the model's weights so that it computes the same without the adapters, and take these out."""
        raise UnsupportedError(
            f"adapters of type {self.registry.name_of(type(self))} are no change of weights, so they can't be merged: "
            "export without --merge"
        )


@dataclass(frozen=True, kw_only=True)
class ProjectionAdapter(AdapterConfig):
    """Base config of adapters at projections that are chosen by role or name."""

    # roles (q, k, v, o, gate, up, down, dense, lm_head) or patterns of names such as *.blocks.[0-3].mixer.*
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    def places(self, model: nn.Module) -> list[Place]:
        """Those that `targets` names."""
        return chosen_places(model, self.targets, given=self.targets != type(self).targets)

    @torch.no_grad()
    def merge(self, model: Model) -> None:
        """Merge every projection's adapter into its weight."""
        for place in self.places(model):
            owner, projection = place.owner, place.target
            assert owner.adapters is not None
            adapter = owner.adapters[place.projection]
            assert isinstance(adapter, Adapter)
            weight, bias = adapter.merged(projection.weight, projection.bias)
            projection.weight = nn.Parameter(weight.to(projection.weight.dtype), requires_grad=False)
            if bias is not None:
                projection.bias = nn.Parameter(bias.to(projection.weight.dtype), requires_grad=False)
            del owner.adapters[place.projection]
            if not len(owner.adapters):
                owner.adapters = None


def adapters_of(model: nn.Module) -> list[tuple[str, Adapter]]:
    """Every adapter module of a model, with its qualified name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Adapter)]


def _by_every_name(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, those that several modules share under each of their names."""
    first: dict[int, str] = {}
    found = dict(weights)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (known := first.setdefault(id(parameter), name)) != name and known in weights:
            found[name] = weights[known]
    return found


def rates_of(model: nn.Module) -> dict[str, float]:
    """Factors on the learning rate of a model's parameters, by qualified name; those not named have 1."""
    return {f"{name}.{own}": rate for name, adapter in adapters_of(model) for own, rate in adapter.rates.items()}


def place_of(name: str) -> str:
    """The projection that the adapter of this qualified name is at: `….qkv.adapters.q` → `….qkv.q`."""
    owner, _, projection = name.rpartition(".adapters.")
    return owner if projection == "weight" or not owner else f"{owner}.{projection}"


def initialise_adapter(adapter: Adapter, name: str, seed: int) -> None:
    """Draw the parameters of an adapter from the seed and its name in the model."""
    holder = nn.Module()
    inner, *outer = reversed(name.split("."))
    holder.add_module(inner, adapter)
    for part in outer:
        above = nn.Module()
        above.add_module(part, holder)
        holder = above
    initialise(holder, NormalInit(), layers=1, seed=seed)
