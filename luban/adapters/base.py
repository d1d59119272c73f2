"""Base config of adapters, and what every kind does: freeze the model, put modules beside its weights, train these alone.

I inputs, O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from luban.adapters.placement import Place, chosen_places, saved_parameters
from luban.core.errors import ConfigError, UnsupportedError
from luban.core.registry import Registry, Variant
from luban.models.build import build_model, materialise, shared_names, state_of
from luban.models.spec import ModelSpec
from luban.nn.init import NormalInit, initialise
from luban.nn.linear import matmul_owners
from luban.nn.packed import KINDS, pack_frozen

if TYPE_CHECKING:
    from luban.models.base import Model


class Adapter(nn.Module):
    """Base class of modules that adapters put into a model. Its parameters are trained; buffers are saved with them."""

    reads_weight = False  # it reads the frozen weight of its projection, which then can't be packed
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
    # how the frozen matrices of the layers are kept: in the precision of the matmuls, or packed in 8 or 4 bits (QLoRA)
    base: Literal["float", "int8", "nf4"] = "float"
    at_projections: ClassVar[bool] = (
        False  # all of it lies at projections, and without it they compute what the base does
    )
    modules_to_save: tuple[str, ...] = ()  # trained whole beside the adapter: embedding, lm_head, norm, head, bias

    @property
    def removable(self) -> bool:
        """Whether `without_adapters` gives the base."""
        return self.at_projections and not self.modules_to_save

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
        saved = saved_parameters(model, self.modules_to_save)
        model.requires_grad_(False)
        like = next(p for p in model.parameters() if p.is_floating_point())
        with torch.device(like.device):
            self.insert(model)
        if self.base != "float" and (reader := weight_reader(model)):
            raise ConfigError(f"the adapter at {reader} reads the weight that it adapts, so adapter.base must be float")
        for _, adapter in adapters_of(model):
            adapter.to(like.dtype)
        for parameter in saved:
            parameter.requires_grad_(True)

    def pack_base(self, model: Model) -> None:
        """Pack the frozen matrices of the layers as `base` says; embeddings, norms and the head stay as they are."""
        if self.base != "float":
            pack_frozen(model, KINDS[self.base])

    def initial(self, spec: ModelSpec, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The adapters' parameters and buffers before the first step, by name; drawn from the seed and their names, or
        computed from the frozen `weights`. They don't depend on how the run is spread over processes."""
        model = build_model(spec, device="meta")
        named = {**weights, **{name: weights[first] for name, first in shared_names(model).items() if first in weights}}
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
        instead = "export without --merge" if self.peft else "Luban reads the run itself, as a model or by --adapter"
        raise UnsupportedError(
            f"adapters of type {self.registry.name_of(type(self))} are no change of weights, so they can't be merged: {instead}"
        )


@dataclass(frozen=True, kw_only=True)
class ProjectionAdapter(AdapterConfig):
    """Base config of adapters at projections that are chosen by role or name."""

    at_projections = True
    # roles (q, k, v, o, gate, up, down, dense, lm_head) or patterns of names such as *.blocks.[0-3].mixer.*
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    def places(self, model: nn.Module) -> list[Place]:
        """Those that `targets` names."""
        return chosen_places(model, self.targets, given=self.targets != type(self).targets)

    @torch.no_grad()
    def merge(self, model: Model) -> None:
        """Merge every projection's adapter into its weight. A tied output layer gets a weight of its own, since the embedding
        doesn't change; `model.spec` says so then. Raises UnsupportedError for a model without these adapters."""
        shared = shared_names(model)
        for place in self.places(model):
            owner, projection = place.owner, place.target
            adapter = None if owner.adapters is None else dict(owner.adapters).get(place.projection)
            if owner.adapters is None or not isinstance(adapter, Adapter):
                raise UnsupportedError(f"{place.name} has no adapter: it was merged already, or is another model's")
            if f"{place.name}.weight" in shared:
                model.spec = replace(model.spec, tied_head=False)
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


def weight_reader(model: nn.Module) -> str | None:
    """A projection whose adapter reads its weight, which then can't be packed; None: there is none."""
    return next((place_of(name) for name, adapter in adapters_of(model) if adapter.reads_weight), None)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside of the block a model with a removable adapter computes what its base does."""
    held = [(owner, owner.adapters) for _, owner in matmul_owners(model) if owner.adapters is not None]
    for owner, _ in held:
        owner.adapters = None
    try:
        yield
    finally:
        for owner, adapters in held:
            owner.adapters = adapters


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
