"""The metadata of a GGUF file while it is read: an architecture's keys, and which keys nobody looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from luban.core.errors import ArtifactError, UnsupportedError
from luban.models.convert.fields import ReadTable

TOKENS = "tokenizer.ggml.tokens"
NOTHING = (None, 0, 0.0, False, "", [])  # values that leave a key without effect
ONE = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "logit_scale", "embedding_scale", "residual_scale")
# keys of every architecture, and of `general` and `tokenizer`, that change nothing in what is computed
HARMLESS = re.compile(
    r"general\..*|split\..*|imatrix\..*|quantize\..*|tokenizer\.(chat_templates?|huggingface)\b.*"
    r"|tokenizer\.ggml\.((fim_|prefix_|suffix_|middle_|eom_|cls_|mask_|seperator_|separator_)\w+|token_type_count)"
    r"|[^.]+\.(rope\.scaling\.finetuned|tensor_data_layout|vocab_size|attention\.causal)"
)


class ArchitectureKeys:
    """Keys that begin with the architecture's name.

    Args:
        metadata: of the whole file; give a `ReadTable` to learn afterwards what wasn't read.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        self.metadata = metadata if isinstance(metadata, ReadTable) else ReadTable(metadata)
        self.architecture = architecture

    def need(self, key: str) -> Any:
        """The value of a key that must be there. Raises ArtifactError where it isn't."""
        if f"{self.architecture}.{key}" not in self.metadata:
            raise ArtifactError(f"the GGUF metadata lacks {self.architecture}.{key}")
        return self._alike(self.metadata[f"{self.architecture}.{key}"])

    def get(self, key: str, default: Any) -> Any:
        """The value of a key, or llama.cpp's own default. Raises ArtifactError where a number is needed and isn't there."""
        name = f"{self.architecture}.{key}"
        value = self._alike(self.metadata.get(name, default))
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        if number and (isinstance(value, (bool, str)) or (isinstance(value, float) and isinstance(default, int))):
            raise ArtifactError(f"the GGUF metadata says {name} = {value!r}: a number is needed")
        return value

    def _alike(self, value: Any) -> Any:
        """One number for a list, one a layer, of equal ones."""
        several = isinstance(value, list) and len(value) > 0 and type(value[0]) is int and len(set(value)) == 1
        return value[0] if several else value

    def only(self, key: str, supported: Any) -> None:
        """Refuse a value that isn't built."""
        if self.get(key, supported) != supported:
            name = f"{self.architecture}.{key}"
            raise UnsupportedError(
                f"the GGUF metadata says {name} = {self.metadata[name]!r}; only {supported!r} is supported here"
            )

    def vocabulary(self) -> int:
        """Tokens in the file's vocabulary."""
        return len(self.metadata.get(TOKENS, ()))

    def scaling(self) -> dict[str, Any] | None:
        """`rope_scaling` as config.json would have it. Linear where a factor has no type, as llama.cpp reads it.

        Raises:
            UnsupportedError: an attention factor or another type.
        """
        kind = self.get("rope.scaling.type", "linear")
        factor = self.get("rope.scaling.factor", self.get("rope.scale_linear", 0.0))
        self.get("rope.scale_linear", 0.0)  # the older name, which a factor overrides
        for key in ONE[:2]:
            self.only(key, 1.0)
        original = self.get("rope.scaling.original_context_length", self.get("context_length", 0))
        fast, slow = self.get("rope.scaling.yarn_beta_fast", 32.0), self.get("rope.scaling.yarn_beta_slow", 1.0)
        if kind == "none" or factor in (0, 1):
            return None
        if kind == "yarn":
            self.only("rope.scaling.yarn_ext_factor", 1.0)
            return {
                "rope_type": kind,
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": fast,
                "beta_slow": slow,
            }
        if kind != "linear":
            raise UnsupportedError(
                f"the GGUF metadata asks for rotary scaling '{kind}'; known are none, linear and yarn"
            )
        return {"rope_type": kind, "factor": factor}

    def refuse_others(self) -> None:
        """Raise UnsupportedError naming a key of the architecture that nobody read and that would change the computation."""
        self.only("attention.causal", True)
        for name, value in self.metadata.unread().items():
            own = name.removeprefix(f"{self.architecture}.")
            if own == name or HARMLESS.fullmatch(name) or value in NOTHING or (own in ONE and value == 1):
                continue
            raise UnsupportedError(
                f"the GGUF metadata says {name} = {value!r}, which changes the computation and isn't read"
            )


def unread_keys(metadata: ReadTable) -> tuple[str, ...]:
    """Keys that nobody read and that aren't known to be harmless, as "name = value"; lists and long values are left out."""
    found = []
    for name, value in metadata.unread().items():
        if HARMLESS.fullmatch(name) or value in NOTHING:
            continue
        found.append(f"{name} = {value!r}" if len(repr(value)) < 80 else name)
    return tuple(found)
