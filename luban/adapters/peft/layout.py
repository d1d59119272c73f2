"""What the kinds of adapters share in PEFT's layout: names of modules, and modules that are saved whole."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from luban.adapters.base import AdapterConfig
from luban.core.errors import ArtifactError, UnsupportedError, nearest
from luban.core.registry import Registry
from luban.models.base import Model
from luban.models.build import build_model, shared_names, state_of
from luban.models.convert.base import ExpertSlice, Format, Fused, Pair, Stacked

PREFIX = "base_model.model."  # of every tensor of an adapter that changes modules
SHORT = "base_model."  # … of what is saved beside a prompt
LM_HEAD = "lm_head"  # transformers' output layer, which formats of tied models don't list
AnyPair = Pair | Fused | Stacked
KINDS = Registry(
    "kind of PEFT adapter",
    {
        "LORA": "luban.adapters.peft.low_rank:LowRankLayout",
        "IA3": "luban.adapters.peft.scales:ScalesLayout",
        "PROMPT_TUNING": "luban.adapters.peft.prompts:PromptLayout",
        "PREFIX_TUNING": "luban.adapters.peft.prompts:PrefixLayout",
    },
)


@dataclass(frozen=True)
class PeftFiles:
    """An adapter as PEFT keeps it."""

    config: dict[str, Any]  # adapter_config.json
    tensors: dict[str, Tensor]  # adapter_model.safetensors


@dataclass(frozen=True)
class OurAdapter:
    """An adapter of Luban's."""

    config: AdapterConfig
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by their names in the adapted model


class Layout(Protocol):
    """How one kind of adapter is kept."""

    def write(self, config: Any, model: Model, names: Names) -> PeftFiles:
        """Of an adapted model."""
        ...

    def read(self, files: PeftFiles, model: Model, names: Names) -> OurAdapter:
        """For a model without adapters. Raises UnsupportedError or ArtifactError for what can't be read."""
        ...


def layout_of(kind: str, where: str) -> Layout:
    """The layout of a PEFT kind. Raises UnsupportedError naming those that are read."""
    if kind not in KINDS.entries:
        raise UnsupportedError(
            f"{where} holds a PEFT adapter of kind {kind}, which isn't read (known: {', '.join(sorted(KINDS))})"
        )
    return KINDS[kind]()


class Names:
    """Modules of a model in a Hugging Face format."""

    def __init__(self, form: Format, model: Model):
        self.spec = model.spec
        self.tensors: dict[str, AnyPair] = {pair.theirs: pair for pair in form.pairs(model.spec)}
        self.by_theirs: dict[str, AnyPair] = {
            name.removesuffix(".weight"): pair for name, pair in self.tensors.items() if name.endswith(".weight")
        }
        self.theirs_of = {ours: theirs for theirs, pair in self.by_theirs.items() for ours in ours_of(pair)}
        self.shared = shared_names(model)
        self.own = frozenset(state_of(build_model(model.spec, device="meta")))  # without those of adapters
        self.prefix = form.prefix

    def module_of(self, ours: str) -> str:
        """Their module of one of our modules. Raises UnsupportedError where the format has none."""
        if f"{ours}.weight" in self.shared:  # tied: the embedding has the other name
            return LM_HEAD
        found = self.theirs_of.get(f"{ours}.weight")
        if found is None:
            raise UnsupportedError(f"the Hugging Face format of this model has no module for {ours}")
        return found

    def pair_of(self, theirs: str) -> AnyPair:
        """What their module holds of ours. Raises ArtifactError for an unknown one."""
        for name in (theirs, self.prefix + theirs):
            if name in self.by_theirs:
                return self.by_theirs[name]
        if theirs.rpartition(".")[2] == LM_HEAD:  # tied: the embedding's tensor under another name
            return Pair("head.weight", f"{LM_HEAD}.weight")
        raise ArtifactError(f"the adapter changes {theirs}, which this model hasn't{nearest(theirs, self.by_theirs)}")

    def tensor(self, theirs: str) -> AnyPair | None:
        """What their tensor of this name holds of ours; None: the format has no such tensor."""
        for name in (theirs, self.prefix + theirs):
            if name in self.tensors:
                return self.tensors[name]
        tied = theirs.rpartition(".")[0].rpartition(".")[2] == LM_HEAD and "head.weight" in self.shared
        return Pair("head.weight", theirs) if tied else None

    def targets(self, modules: Collection[str]) -> list[str]:
        """Modules as `target_modules` names them: by their last names where these mean no other, else whole."""
        last = {name.rpartition(".")[2] for name in modules}
        meant = {name for name in self.by_theirs if name.rpartition(".")[2] in last}
        return sorted(last) if meant <= set(modules) else sorted(modules)


def ours_of(pair: AnyPair) -> tuple[str, ...]:
    """The names of our tensors in a pair."""
    return (pair.ours,) if isinstance(pair, Pair) else pair.ours


def by_pattern(name: str, patterns: Mapping[str, float] | None, default: float) -> float:
    """A number of PEFT's `rank_pattern` or `alpha_pattern` for a module."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def module_tensors(files: PeftFiles) -> dict[str, Tensor]:
    """The tensors by the names of the modules that they change; beside a prompt these stand after a shorter prefix."""
    return {name.removeprefix(PREFIX).removeprefix(SHORT): tensor for name, tensor in files.tensors.items()}


@dataclass(frozen=True)
class Whole:
    """Parameters of the model itself that an adapter holds, by their names."""

    tensors: dict[str, Tensor]
    modules: list[str]  # `modules_to_save`: those that are kept with their weights
    bias: str  # PEFT's name for which biases are kept beside them: "none", "lora_only" (of adapted modules), "all"


def saved_whole(model: Model, names: Names, adapted: Collection[str] = ()) -> Whole:
    """The parameters of the model itself that are trained. A tied embedding stands under both names, as PEFT copies each module.

    Args:
        adapted: modules with adapters, by their names.

    Raises:
        UnsupportedError: a parameter that the format hasn't, or a module that is trained whole and adapted, too.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in names.own}
    trained = {name for name, p in parameters.items() if p.requires_grad}
    found: dict[str, Tensor] = {}
    for theirs, pair in names.tensors.items():
        ours = {name: names.shared.get(name, name) for name in ours_of(pair)}
        if trained.isdisjoint(ours.values()):
            continue
        trained_here = pair.join({name: parameters[first].detach() for name, first in ours.items()}).clone()
        found[theirs] = trained_here
        if names.shared.get("head.weight") in ours.values():  # a language model whose embedding is tied
            found.setdefault(f"{LM_HEAD}.weight", trained_here.clone())
    if lost := trained - {names.shared.get(n, n) for pair in names.tensors.values() for n in ours_of(pair)}:
        raise UnsupportedError(f"the Hugging Face format of this model has no tensor for {min(lost)}, which is trained")
    whole = {name.rpartition(".")[0] for name in found if not name.endswith(".bias")}
    if both := whole.intersection(adapted):
        raise UnsupportedError(
            f"PEFT either adapts a module or saves it whole, and {min(both)} is both: leave it out of adapter.targets or of "
            "adapter.modules_to_save, or export the run with --merge"
        )
    lone = {name.rpartition(".")[0] for name in found} - whole  # of which the bias alone is trained
    for module in lone.intersection(adapted):
        found[f"{module}.base_layer.bias"] = found.pop(f"{module}.bias")
    bias = "none" if not lone else "lora_only" if lone.issubset(adapted) else "all"
    return Whole({PREFIX + name: t for name, t in found.items()}, names.targets(whole), bias)


def read_whole(
    tensors: Mapping[str, Tensor], names: Names, model: Model, to_save: Collection[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Parameters that are saved whole by our names, and what `modules_to_save` of ours names them.

    Args:
        tensors: those that are no part of the adapters at projections, by their names. PEFT also writes unchanged embeddings
            and biases here, which are left out.
        to_save: `modules_to_save`, ends of their modules' names.

    Raises:
        UnsupportedError: for a tensor that nothing here reads.
    """
    found: dict[str, Tensor] = {}
    state = state_of(model)
    for name, tensor in tensors.items():
        pair = names.tensor(name.replace(".base_layer.", "."))
        if pair is None or isinstance(pair, ExpertSlice):
            raise UnsupportedError(f"adapter_model.safetensors holds the tensor {name}, which isn't read")
        parts = {names.shared.get(ours, ours): part for ours, part in pair.split(tensor).items()}
        wanted = name.rpartition(".")[0].endswith(tuple(to_save))
        if not wanted and all(torch.equal(part, state[ours].to(part.dtype)) for ours, part in parts.items()):
            continue
        for ours, part in parts.items():
            if ours in found and not torch.equal(found[ours], part):
                raise UnsupportedError(
                    f"the adapter holds other weights for {name} than for the embedding, which this model ties to it"
                )
            found[ours] = part
    of: dict[str, set[str]] = {}  # module → all of its parameters
    for name in state:
        of.setdefault(name.rpartition(".")[0], set()).add(name)
    saved = {module if of[module] <= found.keys() else name for name in found for module in (name.rpartition(".")[0],)}
    return found, tuple(sorted(saved))
