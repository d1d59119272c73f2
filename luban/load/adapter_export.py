"""Adapters out of Luban: PEFT's layout, or merged into the weights of their base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from luban.adapters.peft.layout import Names, layout_of
from luban.adapters.peft.tasks import task_of
from luban.checkpoint.storage import write_safetensors
from luban.core.artifact import write_json
from luban.core.errors import UnsupportedError
from luban.core.terms import require_exportable
from luban.core.whole_directory import require_vacant, whole_directory
from luban.load.adapted import BASE, PEFT_CONFIG, PEFT_WEIGHTS, format_at
from luban.load.export import copy_tokenizer, parameters
from luban.load.model import LoadedModel
from luban.nn.linear import matmul_owners


def export_adapter(m: LoadedModel, out: str | Path) -> Path:
    """Write the adapter of a model as PEFT reads it: adapter_config.json, adapter_model.safetensors, in the precision that it was
    loaded in, and the tokenizer.

    Raises:
        UnsupportedError: PEFT has no kind that computes the same, or no Hugging Face format expresses the base.
        ArtifactError: `out` is already there.
        LineageError: a licence forbids it.
    """
    assert m.adapter is not None
    config, out = m.adapter.config, Path(out)
    if m.manifest:
        require_exportable(m.manifest, m.name)
    require_vacant(out)
    if not config.peft:
        kind = config.registry.name_of(type(config))
        raise UnsupportedError(
            f"PEFT has no adapter that computes what {kind} does, so {m.name} isn't written in its layout: "
            f"Luban reads the run itself, as a model or by --adapter"
        )
    parameters(m.module)  # refused where a tensor holds NaN
    form = format_at(m)
    files = layout_of(config.peft, m.name).write(config, m.module, Names(form, m.module))
    settings = {
        **files.config,
        "base_model_name_or_path": m.adapter.base,
        "task_type": task_of(m.spec, form),
        "inference_mode": True,
    }
    with whole_directory(out) as folder:
        write_safetensors({name: t.contiguous() for name, t in files.tensors.items()}, folder / PEFT_WEIGHTS)
        write_json(folder / PEFT_CONFIG, settings)
        write_json(folder / BASE, {"weights_hash": m.adapter.base_weights, "base": config.base})
        if m.tokenizer is not None:
            copy_tokenizer(m, folder)
    return out


def merged(m: LoadedModel) -> LoadedModel:
    """The model with its adapter merged into the weights, in place. Raises UnsupportedError for int8 weights and for adapters
    that are no change of weights."""
    if m.adapter is None:
        raise UnsupportedError(f"{m.name} has no adapter, so there is nothing to merge: export it without --merge")
    if any(owner.packed is not None for _, owner in matmul_owners(m.module)):
        raise UnsupportedError(
            "a merge into quantised weights would round what the adapter learned away: --merge needs a base in "
            "floats (adapter.base = float), and the export without it works"
        )
    m.adapter.config.merge(m.module)
    return replace(m, spec=m.module.spec, adapter=None)
