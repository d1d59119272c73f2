"""Prompt and prefix tuning as PEFT keeps them: one tensor, `prompt_embeddings`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from luban.adapters.base import adapters_of
from luban.adapters.peft.layout import (
    PREFIX,
    SHORT,
    Names,
    OurAdapter,
    PeftFiles,
    module_tensors,
    read_whole,
    saved_whole,
)
from luban.adapters.prefix import Prefix, PTuningV2
from luban.adapters.prompt import PromptTuning
from luban.core.errors import ArtifactError, UnsupportedError
from luban.models.base import Model

TENSOR = "prompt_embeddings"
OURS = "prompts.embedding"
HEADS = frozenset(("score", "classifier", "qa_outputs"))


def _embeddings(files: PeftFiles) -> Tensor:
    if TENSOR not in files.tensors:
        raise ArtifactError(f"adapter_model.safetensors lacks the tensor {TENSOR}")
    return files.tensors[TENSOR]


def _beside(files: PeftFiles, model: Model, names: Names) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The head that is saved with the embeddings, as `read_whole` gives it."""
    others = {name: tensor for name, tensor in module_tensors(files).items() if name != TENSOR}
    return read_whole(others, names, model, files.config.get("modules_to_save") or ())


def _head(config: PTuningV2 | PromptTuning, model: Model, names: Names) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a head that was trained with the embeddings, and the setting that names it."""
    whole = saved_whole(model, names)
    if whole.bias != "none" or not HEADS.issuperset(whole.modules):
        trained = ", ".join(config.modules_to_save)
        raise UnsupportedError(
            f"PEFT saves no modules but a head beside prompts, and {trained} was trained with this one: serve the run itself"
        )
    tensors = {SHORT + name.removeprefix(PREFIX): tensor for name, tensor in whole.tensors.items()}
    return tensors, {"modules_to_save": whole.modules} if whole.modules else {}


def _settings(kind: str, config: PTuningV2 | PromptTuning, model: Model) -> dict[str, Any]:
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
        head, to_save = _head(config, model, names)
        return PeftFiles(
            {**_settings("PROMPT_TUNING", config, model), "prompt_tuning_init": "RANDOM", **to_save},
            {TENSOR: dict(model.named_parameters())[OURS].detach().clone(), **head},
        )

    def read(self, files: PeftFiles, model: Model, names: Names) -> OurAdapter:
        """The embeddings."""
        rows = _embeddings(files)
        head, saved = _beside(files, model, names)
        config = PromptTuning(length=rows.shape[0], init="random", modules_to_save=saved)
        return OurAdapter(config, {OURS: rows, **head})


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
        head, to_save = _head(config, model, names)
        return PeftFiles({**settings, **to_save}, {TENSOR: prefix.values().detach().clone(), **head})

    def read(self, files: PeftFiles, model: Model, names: Names) -> OurAdapter:
        """Keys and values of all layers."""
        rows = _embeddings(files)
        shape = model.spec.layers[0].mixer.attention(model.spec.width)
        assert shape is not None
        wanted = len(model.spec.layers) * 2 * shape.key_heads * shape.head_dim
        if rows.shape[1] != wanted:
            raise UnsupportedError(f"the prefix has {rows.shape[1]} numbers a token, and this model needs {wanted}")
        head, saved = _beside(files, model, names)
        return OurAdapter(PTuningV2(length=rows.shape[0], modules_to_save=saved), {OURS: rows, **head})
