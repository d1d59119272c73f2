"""LoRA, DoRA and PiSSA as PEFT keeps them.

Where a foreign model holds q, k and v (or gate and up) in one weight, PEFT has one product for it. Ours have one each: their
ranks add up, and each B fills its own rows and columns of the joint one. I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from luban.adapters.base import Adapter, adapters_of, place_of
from luban.adapters.dora import Directional
from luban.adapters.lora import LoRA, LowRank
from luban.adapters.peft.layout import (
    PREFIX,
    AnyPair,
    Names,
    OurAdapter,
    PeftFiles,
    by_pattern,
    module_tensors,
    ours_of,
    read_whole,
    saved_whole,
)
from luban.core.errors import ArtifactError, UnsupportedError
from luban.models.base import Model

A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
UNREAD = {  # settings that change what is computed, and the values that change nothing
    "layer_replication": None,
    "use_qalora": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "arrow_config": None,
    "lora_bias": False,
    "alora_invocation_tokens": None,
}

BIASES = ("none", "lora_only", "all")  # which biases were trained, too
KEPT_BASE = (
    True,
    False,
    None,
    "gaussian",
    "orthogonal",
    "eva",
)  # values of init_lora_weights that leave the base as it is


class LowRankLayout:
    """PEFT's LORA."""

    def write(self, config: LoRA, model: Model, names: Names) -> PeftFiles:
        """Products, magnitudes and modules saved whole."""
        grouped: dict[str, dict[str, Adapter]] = {}
        for name, adapter in adapters_of(model):
            place = place_of(name)
            grouped.setdefault(names.module_of(place), {})[f"{place}.weight"] = adapter
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for module, parts in grouped.items():
            pair = plain(names.pair_of(module))
            a, b = _joint(pair, parts)
            tensors |= {f"{PREFIX}{module}{A}": a, f"{PREFIX}{module}{B}": b}
            ranks[module] = a.shape[0]
            magnitudes = {
                name: part.magnitude.detach() for name, part in parts.items() if isinstance(part, Directional)
            }
            if magnitudes:
                if len(magnitudes) < len(ours_of(pair)):
                    raise UnsupportedError(
                        f"PEFT has one DoRA for the whole of {module}, of which only some parts are adapted here: adapt all of them"
                    )
                tensors[f"{PREFIX}{module}{MAGNITUDE}"] = pair.join(magnitudes).contiguous()
        usual = min(ranks.values())
        whole = saved_whole(model, names, grouped)
        settings: dict[str, Any] = {
            "peft_type": "LORA",
            "r": usual,
            "lora_alpha": self._alpha(config, usual),
            "lora_dropout": config.dropout,
            "target_modules": names.targets(grouped),
            "rank_pattern": {module: rank for module, rank in ranks.items() if rank != usual},
            "alpha_pattern": {module: self._alpha(config, rank) for module, rank in ranks.items() if rank != usual},
            "use_rslora": config.rank_stabilised,
            "use_dora": any(name.endswith(MAGNITUDE) for name in tensors),
            "fan_in_fan_out": any(getattr(names.pair_of(module), "transposed", False) for module in grouped),
            "bias": whole.bias,
            "init_lora_weights": True,
            "modules_to_save": whole.modules or None,
        }
        return PeftFiles(settings, {**tensors, **whole.tensors})

    @staticmethod
    def _alpha(config: LoRA, rank: int) -> float:
        """The α that gives the same scale at another rank."""
        alpha = config.scale * (math.sqrt(rank) if config.rank_stabilised else rank)
        return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha

    def read(self, files: PeftFiles, model: Model, names: Names) -> OurAdapter:
        """Products and magnitudes, by our projections. Where ranks or scales differ, narrow ones are padded with zeros and
        scales multiplied into B."""
        given = files.config
        for name, neutral in UNREAD.items():
            if given.get(name) not in (neutral, None, [], {}):
                raise UnsupportedError(f"adapter_config.json has {name} = {given[name]!r}, which isn't read")
        if (init := given.get("init_lora_weights")) not in KEPT_BASE:
            raise UnsupportedError(
                f"adapter_config.json has init_lora_weights = {init!r}, which changed the weights of the base, too: write it as a "
                "plain LoRA, by PEFT's save_pretrained(DIR, path_initial_model_for_weight_conversion=…)"
            )
        tensors = module_tensors(files)
        modules = sorted(name.removesuffix(A) for name in tensors if name.endswith(A))
        if not modules:
            raise ArtifactError("adapter_model.safetensors holds no lora_A tensors")
        require_biases(given.get("bias") or "none", modules, tensors, names)
        scales, parts = {}, {}
        for module in modules:
            if f"{module}{B}" not in tensors:
                raise ArtifactError(f"adapter_model.safetensors lacks the tensor {PREFIX}{module}{B}")
            rank = tensors[f"{module}{A}"].shape[0]
            alpha = by_pattern(module, given.get("alpha_pattern"), given.get("lora_alpha", 8))
            if not isinstance(alpha, int | float) or alpha <= 0:
                raise ArtifactError(
                    f"adapter_config.json has lora_alpha = {alpha!r} for {module}: a number above 0 is needed"
                )
            scales[module] = alpha / (math.sqrt(rank) if given.get("use_rslora") else rank)
            pair = plain(names.pair_of(module))
            for ours, b in pair.split(tensors[f"{module}{B}"]).items():
                parts[ours] = (module, tensors[f"{module}{A}"], b)
        rank, dora = max(a.shape[0] for _, a, _ in parts.values()), bool(given.get("use_dora"))
        alike = len({(scales[m], a.shape[0]) for m, a, _ in parts.values()}) == 1
        scale = next(iter(scales.values())) if alike else 1.0
        found: dict[str, Tensor] = {}
        for ours, (module, a, b) in parts.items():
            at = adapter_name(ours, model)
            found[f"{at}.a"] = _padded(a, rank, 0)
            found[f"{at}.b"] = _padded(b if alike else b * scales[module], rank, 1)
        if dora:
            for module in modules:
                if f"{module}{MAGNITUDE}" not in tensors:
                    raise ArtifactError(f"adapter_model.safetensors lacks the tensor {PREFIX}{module}{MAGNITUDE}")
                split = plain(names.pair_of(module)).split(tensors[f"{module}{MAGNITUDE}"])
                found |= {f"{adapter_name(ours, model)}.magnitude": part for ours, part in split.items()}
        kind = LoRA
        if dora:
            from luban.adapters.dora import DoRA as kind
        kinds = (A, B, MAGNITUDE) if dora else (A, B)
        others = {name: t for name, t in tensors.items() if not name.endswith(kinds)}
        whole, saved = read_whole(others, names, model, given.get("modules_to_save") or ())
        config = kind(
            rank=rank,
            alpha=scale * rank,
            dropout=given.get("lora_dropout", 0.0),
            targets=tuple(name.removesuffix(".weight") for name in parts),
            modules_to_save=saved,
        )
        return OurAdapter(config, found | whole)


def require_biases(bias: str, modules: Collection[str], tensors: Mapping[str, Tensor], names: Names) -> None:
    """Check that the biases which PEFT trained with the adapters are there; `read_whole` reads them.

    Args:
        bias: PEFT's setting.
        modules: that are adapted, by their names.

    Raises:
        ArtifactError: for an unknown setting, or a bias of an adapted module that isn't there.
    """
    if bias not in BIASES:
        raise ArtifactError(f"adapter_config.json has bias = {bias!r}: one of {', '.join(BIASES)} is needed")
    for module in modules if bias != "none" else ():
        if names.tensor(f"{module}.bias") is None:
            continue  # the model has none there
        if tensors.keys().isdisjoint((f"{module}.bias", f"{module}.base_layer.bias")):
            raise ArtifactError(
                f"adapter_config.json has bias = {bias!r}, and adapter_model.safetensors lacks {PREFIX}{module}.base_layer.bias, "
                "which was trained: write it with a newer PEFT, or merge it there (merge_and_unload)"
            )


def adapter_name(weight: str, model: Model) -> str:
    """The name in the model of the adapter at a projection, given by the name of its weight."""
    place = weight.removesuffix(".weight")
    owner, _, own = place.rpartition(".")
    projections = getattr(model.get_submodule(place), "projections", None)
    if projections is not None:  # the owner of one weight
        return f"{place}.adapters.weight"
    return f"{owner}.adapters.{own}"


def plain(pair: AnyPair) -> AnyPair:
    """The pair for tensors whose rows are outputs, as B's are, however the weight lies."""
    return replace(pair, transposed=False) if getattr(pair, "transposed", False) else pair  # type: ignore[arg-type]


def _joint(pair: AnyPair, parts: dict[str, Adapter]) -> tuple[Tensor, Tensor]:
    """A (ΣR, I) and B (O, ΣR) of the adapted parts of one foreign weight."""
    products = {name: _product(adapter) for name, adapter in parts.items()}
    total, start, rows = sum(a.shape[0] for a, _ in products.values()), 0, {}
    for name, (a, b) in products.items():
        rows[name] = b.new_zeros(b.shape[0], total)
        rows[name][:, start : start + a.shape[0]] = b
        start += a.shape[0]
    if missing := [name for name in ours_of(pair) if name not in rows]:
        for name, outputs in _outputs(pair, rows).items():
            if name in missing:
                rows[name] = next(iter(rows.values())).new_zeros(outputs, total)
    return torch.cat([a for a, _ in products.values()]), pair.join(rows).contiguous()


def _outputs(pair: AnyPair, rows: dict[str, Tensor]) -> dict[str, int]:
    """Outputs of each part of a joint weight, of which some are known."""
    heads = getattr(pair, "heads", None)
    known = {name: tensor.shape[0] for name, tensor in rows.items()}
    if heads is None:  # gates and ups
        return dict.fromkeys(ours_of(pair), next(iter(known.values())))
    sizes = dict(zip(ours_of(pair), (heads, pair.key_heads, pair.key_heads), strict=True))  # type: ignore[union-attr]
    name, outputs = next(iter(known.items()))
    return {each: outputs * size // sizes[name] for each, size in sizes.items()}


def _product(adapter: Adapter) -> tuple[Tensor, Tensor]:
    assert isinstance(adapter, LowRank)
    a, b = adapter.factors()
    return a.detach(), b.detach()


def _padded(matrix: Tensor, rank: int, dim: int) -> Tensor:
    """The matrix with zeros up to this rank in dimension `dim`."""
    shape = list(matrix.shape)
    shape[dim] = rank - matrix.shape[dim]
    return matrix if not shape[dim] else torch.cat([matrix, matrix.new_zeros(shape)], dim)
