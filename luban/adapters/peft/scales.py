"""(IA)³ as PEFT keeps it: `ia3_l` of (outputs, 1), for feed-forward modules (1, inputs)."""

from __future__ import annotations

from torch import Tensor

from luban.adapters.base import adapters_of, place_of
from luban.adapters.ia3 import IA3, Scale
from luban.adapters.peft.layout import (
    PREFIX,
    Names,
    OurAdapter,
    PeftFiles,
    module_tensors,
    ours_of,
    read_whole,
    saved_whole,
)
from luban.adapters.peft.low_rank import adapter_name, plain
from luban.core.errors import UnsupportedError
from luban.models.base import Model
from luban.models.convert.base import Pair

L = ".ia3_l"


class ScalesLayout:
    """PEFT's IA3."""

    def write(self, config: IA3, model: Model, names: Names) -> PeftFiles:
        """Scales and modules saved whole."""
        outputs: dict[str, dict[str, Tensor]] = {}
        inputs: dict[str, Tensor] = {}
        for name, adapter in adapters_of(model):
            assert isinstance(adapter, Scale)
            place, scale = place_of(name), adapter.scale.detach()
            if adapter.of_input:
                inputs[names.module_of(place)] = scale
            elif place.endswith(".up"):
                inputs[names.module_of(place.removesuffix("up") + "down")] = scale
            else:
                outputs.setdefault(names.module_of(place), {})[f"{place}.weight"] = scale
        tensors = {f"{PREFIX}{module}{L}": scale[None].clone() for module, scale in inputs.items()}
        for module, parts in outputs.items():
            pair = plain(names.pair_of(module))
            if len(parts) < len(ours_of(pair)):
                for ours in ours_of(pair):
                    rows = model.get_submodule(ours.removesuffix(".weight")).out_features
                    parts.setdefault(ours, next(iter(parts.values())).new_ones(rows))  # type: ignore[arg-type]
            tensors[f"{PREFIX}{module}{L}"] = pair.join(parts)[:, None].contiguous()
        whole = saved_whole(model, names, (*outputs, *inputs))
        if whole.bias != "none":
            raise UnsupportedError(
                "PEFT saves no biases beside (IA)³, and some were trained with this one: serve the run itself"
            )
        settings = {
            "peft_type": "IA3",
            "target_modules": names.targets([*outputs, *inputs]),
            "feedforward_modules": names.targets(list(inputs)),
            "fan_in_fan_out": any(getattr(names.pair_of(m), "transposed", False) for m in (*outputs, *inputs)),
            "init_ia3_weights": True,
            "modules_to_save": whole.modules or None,
        }
        return PeftFiles(settings, {**tensors, **whole.tensors})

    def read(self, files: PeftFiles, model: Model, names: Names) -> OurAdapter:
        """Scales by our projections."""
        tensors, found, targets = module_tensors(files), {}, []
        for name, scale in tensors.items():
            if not name.endswith(L):
                continue
            pair = names.pair_of(name.removesuffix(L))
            if scale.shape[0] == 1:
                place = pair.ours.removesuffix(".weight") if isinstance(pair, Pair) else ""
                if not place.endswith("down"):
                    raise UnsupportedError(
                        f"the adapter scales the inputs of {name.removesuffix(L)}, and Luban those of down projections alone"
                    )
                targets.append(place)
                gated = hasattr(model.get_submodule(place.rpartition(".")[0]), "gate")
                at = place.removesuffix("down") + "up" if gated else place
                found[f"{adapter_name(at + '.weight', model)}.scale"] = scale.flatten()
                continue
            for ours, part in plain(pair).split(scale[:, 0]).items():
                targets.append(ours.removesuffix(".weight"))
                found[f"{adapter_name(ours, model)}.scale"] = part
        whole, saved = read_whole(
            {name: t for name, t in tensors.items() if not name.endswith(L)},
            names,
            model,
            files.config.get("modules_to_save") or (),
        )
        return OurAdapter(IA3(targets=tuple(targets), modules_to_save=saved), found | whole)
