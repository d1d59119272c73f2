"""Prompt and prefix tuning as PEFT keeps them: one tensor, `prompt_embeddings`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from luban.adapters.base import adapters_of
from luban.adapters.peft.layout import Names, OurAdapter, PeftFiles
from luban.adapters.prefix import Prefix, PTuningV2
from luban.adapters.prompt import PromptTuning
from luban.core.errors import ArtifactError, UnsupportedError
from luban.models.base import Model

TENSOR = "prompt_embeddings"
OURS = "prompts.embedding"


def _embeddings(files: PeftFiles) -> Tensor:
    if TENSOR not in files.tensors:
        raise ArtifactError(f"adapter_model.safetensors lacks the tensor {TENSOR}")
    return files.tensors[TENSOR]


def _settings(kind: str, config: PTuningV2 | PromptTuning, model: Model) -> dict[str, Any]:
    if config.modules_to_save:
        names = ", ".join(config.modules_to_save)
        raise UnsupportedError(
            f"PEFT saves no modules beside prompts, and {names} was trained with this one: serve the run itself"
        )
    shape = model.spec.layers[0].mixer.attention(model.spec.width)
    assert shape is not None
    return {
        "peft_type": kind,
        "num_virtual_tokens": config.length,
        "token_dim": model.spec.width,
        "num_layers": len(model.spec.layers),
        "num_attention_heads": shape.heads,
        "num_transformer_submodules": 1,
    }


class PromptLayout:
    """PEFT's PROMPT_TUNING."""

    def write(self, config: PromptTuning, model: Model, names: Names) -> PeftFiles:
        """The embeddings."""
        return PeftFiles(
            {**_settings("PROMPT_TUNING", config, model), "prompt_tuning_init": "RANDOM"},
            {TENSOR: dict(model.named_parameters())[OURS].detach().clone()},
        )

    def read(self, files: PeftFiles, model: Model, names: Names) -> OurAdapter:
        """The embeddings."""
        rows = _embeddings(files)
        return OurAdapter(PromptTuning(length=rows.shape[0], init="random"), {OURS: rows})


class PrefixLayout:
    """PEFT's PREFIX_TUNING, its network dropped: keys and values alone."""

    def write(self, config: PTuningV2, model: Model, names: Names) -> PeftFiles:
        """Keys and values of all layers."""
        (_, prefix), *_ = adapters_of(model)
        assert isinstance(prefix, Prefix)
        settings = _settings("PREFIX_TUNING", config, model)
        heads = prefix.heads
        settings |= {
            "prefix_projection": False,
            "encoder_hidden_size": model.spec.width,
            "num_attention_heads": heads,
            "token_dim": heads * prefix.head_dim,
        }
        return PeftFiles(settings, {TENSOR: prefix.values().detach().clone()})

    def read(self, files: PeftFiles, model: Model, names: Names) -> OurAdapter:
        """Keys and values of all layers."""
        rows = _embeddings(files)
        shape = model.spec.layers[0].mixer.attention(model.spec.width)
        assert shape is not None
        wanted = len(model.spec.layers) * 2 * shape.key_heads * shape.head_dim
        if rows.shape[1] != wanted:
            raise UnsupportedError(f"the prefix has {rows.shape[1]} numbers a token, and this model needs {wanted}")
        return OurAdapter(PTuningV2(length=rows.shape[0]), {OURS: rows})
