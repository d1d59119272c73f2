"""The language model inside a model that ranks or classifies and was trained to write as well."""

from __future__ import annotations

import copy
from dataclasses import replace

from luban.load.model import LoadedModel
from luban.models.head.language_model import LanguageModel

WEIGHTS = ("language", "weight")  # of the language model's loss, in objectives that have one beside theirs


def writer_of(m: LoadedModel) -> LoadedModel:
    """The model with its language_model head, where it was trained with one beside another head (a tied decoder; joint
    modelling, GPT-1's auxiliary loss); every other model as it is. The weights are shared, the loaded model isn't changed."""
    head = getattr(m.module.head, "language_model", None)
    objective = {} if m.manifest is None else m.manifest.config.get("objective") or {}
    if head is None or not any(objective.get(name) for name in WEIGHTS):
        return m
    module = copy.copy(m.module)
    module._modules = {**m.module._modules, "head": head}
    module.spec = replace(m.spec, head=LanguageModel())
    return replace(m, module=module, spec=module.spec)
