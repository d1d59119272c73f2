"""A foreign configuration while it is read: typed fields with clear errors, and which entries nobody looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from luban.core.errors import ArtifactError, UnsupportedError

KINDS: dict[type, tuple[Any, str]] = {  # of fields, as JSON has them, and what they are called
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    bool: (bool, "true or false"),
    str: (str, "a name"),
    dict: (Mapping, "a table"),
    list: (list, "a list"),
}
CHANGES: dict[str, tuple[Any, ...]] = {  # fields that change the computation, with the values (besides null) that don't
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "rotary_dim": (),
    "rope_interleaved": (False,),
    "no_rope_layers": ([],),
    "position_embedding_type": ("absolute", "rope"),
    "alibi": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "clip_qkv": (),
    "attention_chunk_size": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "attention_multiplier": (),
    "scale_emb": (1.0,),
    "scale_depth": (),
    "dim_model_base": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0, 1),
    "use_parallel_residual": (False,),
}
HARMLESS = re.compile(  # fields about files, training, classes and tokens, which don't change the computation
    r"_.*|architectures|auto_map|(bos|eos|pad|sep|unk|decoder_start)_token_id|(id2label|label2id|num_labels|problem_type)"
    r"|(torch_)?dtype|torchscript|transformers.*|tokenizer_class|model_type|name_or_path|revision|tf_legacy_loss|language"
    r"|use_cache|use_mems_eval|use_bfloat16|return_dict|output_(attentions|hidden_states|past|router_logits)|keys_to_ignore.*"
    r"|chunk_size_feed_forward|gradient_checkpointing|pretraining_tp|is_encoder_decoder|tie_(encoder_decoder|word_embeddings)"
    r"|task_specific_params|custom_pipelines|finetun(ed|ing_task)|prefix|n_ctx|slow_but_exact|quantization_bit"
    r"|reorder_and_upcast_attn|(scale_)?attention_softmax_in_fp32|predict_special_tokens|mlm_probability"
    r"|dense_act_fn|is_gated_act"  # T5: both follow from feed_forward_proj
    r"|.*(dropout|pdrop|layerdrop|drop_prob|initializer|aux_loss|_std).*|summary_.*|router_.*"
)


class ReadTable(Mapping[str, Any]):
    """A foreign table that notes which of its entries were read; inner tables do so too."""

    def __init__(self, values: Mapping[str, Any]):
        self.values_, self.seen, self.inner = values, set[str](), dict[str, ReadTable]()

    def __getitem__(self, name: str) -> Any:
        self.seen.add(name)
        value = self.values_[name]
        return self.inner.setdefault(name, ReadTable(value)) if isinstance(value, Mapping) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def __repr__(self) -> str:
        return repr(self.values_)

    def unread(self) -> dict[str, Any]:
        """Entries that nobody read, those of inner tables (where any of theirs was read) as `table.entry`."""
        found = {name: value for name, value in self.values_.items() if name not in self.seen}
        for table, inner in self.inner.items():
            found |= {f"{table}.{name}": value for name, value in inner.unread().items()} if inner.seen else {}
        return found


def unread_fields(config: ReadTable, also_read: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Fields of a configuration that no format read and that aren't known to be harmless, as "name = value".

    Args:
        also_read: names that were read elsewhere.

    Raises:
        UnsupportedError: one of them is known to change the computation.
    """
    found = []
    for name, value in config.unread().items():
        last = name.rpartition(".")[2]
        if value is None or last in also_read or HARMLESS.fullmatch(last):
            continue
        if last in CHANGES:
            if value not in CHANGES[last]:
                raise UnsupportedError(
                    f"config.json says {name} = {value!r}, which changes the computation and isn't supported for "
                    f"model_type '{config.get('model_type')}'"
                )
            continue
        found.append(f"{name} = {value!r}")
    return tuple(found)


@dataclass(frozen=True)
class Fields:
    """Typed access to a foreign configuration, with clear errors for missing and ill-typed fields."""

    values: Mapping[str, Any]
    kind: str = field(default="")
    within: str = ""  # of which inner table, its name with a dot behind it

    def need(self, name: str, kind: type = int) -> Any:
        """A field that must be there."""
        if self.values.get(name) is None:
            raise ArtifactError(f"config.json of this {self.kind} model lacks '{self.within}{name}'")
        return self.get(name, None, kind)

    def get(self, name: str, default: Any, kind: type | None = None) -> Any:
        """A field, or the format's own default where it is absent or null. Raises ArtifactError where it is of another
        kind than `kind` (none: than the default)."""
        value, kind = self.values.get(name), kind or type(default)
        if value is None:
            return default
        if kind in KINDS and (not isinstance(value, KINDS[kind][0]) or (isinstance(value, bool) and kind is not bool)):
            raise ArtifactError(
                f"config.json of this {self.kind} model says {self.within}{name} = {value!r}: "
                f"{KINDS[kind][1]} is needed"
            )
        return value

    def inner(self, *names: str) -> Fields:
        """The table under the first of these names that is there and not empty; an empty one where there is none."""
        name = next((name for name in names if self.values.get(name)), names[0])
        return Fields(self.get(name, {}), self.kind, f"{self.within}{name}.")

    def only(self, name: str, supported: Any) -> None:
        """Refuse a field whose value changes the computation in a way that isn't built."""
        if self.get(name, supported) != supported:
            raise UnsupportedError(
                f"config.json asks for {name} = {self.values[name]!r}; only {supported!r} is supported"
            )

    def architecture(self, default: str) -> str:
        """The class of theirs that wrote the directory."""
        return next(iter(self.get("architectures", None, list) or ()), default)

    def labels(self, default: int = 2) -> int:
        """How many classes its head has."""
        return len(self.get("id2label", {})) or self.get("num_labels", default)
