"""What the kinds of adapters share in PEFT's layout: names of modules, and modules that are saved whole."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from luban.adapters.base import AdapterConfig
from luban.core.errors import ArtifactError, UnsupportedError, nearest
from luban.core.registry import Registry
from luban.models.base import Model
from luban.models.build import shared_names
from luban.models.convert.base import Format, Fused, Pair, Stacked

PREFIX = "base_model.model."  # of every tensor of an adapter that changes modules
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
        pairs = [pair for pair in form.pairs(model.spec) if pair.theirs.endswith(".weight")]
        self.by_theirs: dict[str, AnyPair] = {pair.theirs.removesuffix(".weight"): pair for pair in pairs}
        self.theirs_of = {ours: theirs for theirs, pair in self.by_theirs.items() for ours in ours_of(pair)}
        self.shared = shared_names(model)
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


def without_prefix(files: PeftFiles) -> dict[str, Tensor]:
    """The tensors by the names of the modules that they change."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in files.tensors.items()}


def saved_whole(model: Model, names: Names) -> tuple[list[str], dict[str, Tensor]]:
    """`modules_to_save`, and their tensors: parameters of the model itself that are trained. A tied embedding stands under
    both names, as PEFT copies each module."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or ".adapters." in name:
            continue
        owner = name.rpartition(".")[0]
        modules = [names.module_of(owner)] if name.endswith(".weight") else []
        if name in names.shared.values():
            modules.append(LM_HEAD)
        for module in modules:
            found[f"{PREFIX}{module}.weight"] = parameter.detach().clone()
    modules = sorted({name.removeprefix(PREFIX).removesuffix(".weight") for name in found})
    return [module.rpartition(".")[2] for module in modules], found
