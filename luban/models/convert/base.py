"""Base class of foreign formats, and their registry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from luban.core.errors import ArtifactError, UnsupportedError, nearest
from luban.core.registry import Registry
from luban.models.decoder import DecoderBody
from luban.models.head.hidden import Hidden
from luban.models.head.language_model import LanguageModel
from luban.models.layer import LayerSpec
from luban.models.spec import ModelSpec
from luban.nn.feedforward.base import FeedForward
from luban.nn.feedforward.plain import GELU, ReLU, TanhGELU
from luban.nn.mixer.grouped import Grouped

FORMATS = Registry(
    "model type",
    {
        "llama": "luban.models.convert.llama:Llama",
        "mistral": "luban.models.convert.mistral:Mistral",
        "qwen2": "luban.models.convert.qwen2:Qwen2",
        "qwen3": "luban.models.convert.qwen3:Qwen3",
        "mixtral": "luban.models.convert.mixtral:Mixtral",
        "qwen3_moe": "luban.models.convert.mixtral:Qwen3MoE",
        "bert": "luban.models.convert.bert:Bert",
        "roberta": "luban.models.convert.roberta:Roberta",
        "albert": "luban.models.convert.albert:Albert",
        "bart": "luban.models.convert.bart:Bart",
        "t5": "luban.models.convert.t5:T5",
        "longt5": "luban.models.convert.longt5:LongT5",
        "gpt2": "luban.models.convert.gpt2:GPT2",
        "openai-gpt": "luban.models.convert.openai_gpt:OpenAIGPT",
        "bloom": "luban.models.convert.bloom:Bloom",
        "falcon": "luban.models.convert.falcon:Falcon",
        "chatglm": "luban.models.convert.chatglm:ChatGLM",
        "gemma": "luban.models.convert.gemma:Gemma",
        "gemma3_text": "luban.models.convert.gemma3:Gemma3",
        "phi": "luban.models.convert.phi:Phi",
        "phi3": "luban.models.convert.phi3:Phi3",
    },
)


@dataclass(frozen=True)
class Pair:
    """One tensor of ours and the one that holds it in the foreign file."""

    ours: str
    theirs: str
    transposed: bool = False  # theirs is (inputs, outputs), as GPT-2's Conv1D keeps it

    def split(self, theirs: Tensor) -> dict[str, Tensor]:
        """Our tensor, by name."""
        return {self.ours: theirs.t() if self.transposed and theirs.dim() == 2 else theirs}

    def join(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Their tensor."""
        tensor = ours[self.ours]
        return tensor.t().contiguous() if self.transposed and tensor.dim() == 2 else tensor


@dataclass(frozen=True)
class Fused:
    """Queries, keys and values of H and K heads, held in one foreign tensor whose rows are outputs.

    The rows stand either as all queries, all keys, all values, or key head by key head: the queries that share
    it, its key, its value (where K = H: query, key, value of every head).
    """

    ours: tuple[str, str, str]  # names of queries, keys, values
    theirs: str
    heads: int  # H
    key_heads: int  # K
    by_head: bool  # the second order
    transposed: bool = False  # theirs is (inputs, outputs), as GPT-2's Conv1D keeps it

    def split(self, theirs: Tensor) -> dict[str, Tensor]:
        """Our three tensors, by name. Raises ArtifactError where the rows can't be those of so many heads."""
        rows = theirs.t() if self.transposed and theirs.dim() == 2 else theirs
        total = self.heads + 2 * self.key_heads
        if not rows.dim() or rows.shape[0] % total:
            raise ArtifactError(
                f"the tensor {self.theirs} of shape {tuple(theirs.shape)} can't hold queries of "
                f"{self.heads} heads with keys and values of {self.key_heads}"
            )
        width, group = rows.shape[0] // total, self.heads // self.key_heads
        if self.by_head:
            blocks = rows.unflatten(0, (self.key_heads, group + 2, width))
            parts = [part.flatten(0, 2) for part in blocks.split((group, 1, 1), dim=1)]
        else:
            parts = rows.split((self.heads * width, self.key_heads * width, self.key_heads * width))
        return dict(zip(self.ours, parts, strict=True))

    def join(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Their tensor."""
        parts = [ours[name] for name in self.ours]
        if self.by_head:
            width, group = parts[1].shape[0] // self.key_heads, self.heads // self.key_heads
            blocks = [
                part.unflatten(0, (self.key_heads, n, width)) for part, n in zip(parts, (group, 1, 1), strict=True)
            ]
            rows = torch.cat(blocks, dim=1).flatten(0, 2)
        else:
            rows = torch.cat(parts)
        return rows.t().contiguous() if self.transposed and rows.dim() == 2 else rows


@dataclass(frozen=True)
class Stacked:
    """Gates and ups held in one foreign tensor, gates first."""

    ours: tuple[str, str]
    theirs: str

    def split(self, theirs: Tensor) -> dict[str, Tensor]:
        """Our two tensors, by name. Raises ArtifactError for an odd number of rows."""
        if theirs.shape[0] % 2:
            raise ArtifactError(f"the tensor {self.theirs} of shape {tuple(theirs.shape)} can't hold two of one size")
        return dict(zip(self.ours, theirs.chunk(2), strict=True))

    def join(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Their tensor."""
        return torch.cat([ours[name] for name in self.ours])


@dataclass(frozen=True)
class Scaled(Pair):
    """A tensor that stands there divided by a factor."""

    factor: float = 1.0

    def split(self, theirs: Tensor) -> dict[str, Tensor]:
        """Our tensor, by name."""
        return {self.ours: theirs.to(torch.promote_types(theirs.dtype, torch.float32)) * self.factor}

    def join(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Their tensor."""
        tensor = ours[self.ours]
        return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) / self.factor).to(tensor.dtype)


@dataclass(frozen=True)
class Centred(Pair):
    """A norm's weight that stands there less 1."""

    def split(self, theirs: Tensor) -> dict[str, Tensor]:
        """Our tensor, by name."""
        return {self.ours: theirs.to(torch.promote_types(theirs.dtype, torch.float32)) + 1}

    def join(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Their tensor."""
        tensor = ours[self.ours]
        return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) - 1).to(tensor.dtype)


@dataclass(frozen=True)
class ExpertSlice(Pair):
    """One expert's matrix, of which a tensor of ours holds those of all experts (X, O, I)."""

    expert: int = 0  # its number
    experts: int = 1  # X

    def split(self, theirs: Tensor) -> dict[str, Tensor]:
        """The matrix, under a name of its own until all are there (`to_ours`)."""
        return {f"{self.ours}[{self.expert}]": theirs}

    def join(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Their tensor."""
        return ours[self.ours][self.expert]


class TensorNames(Protocol):
    """The tensors of a foreign format."""

    ignored: re.Pattern[str]  # tensors of theirs that hold nothing (caches, masks) or a copy
    prefix: str  # of the body's tensors; files saved without a head leave it out

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused | Stacked]:
        """Every tensor of theirs with what it holds of ours."""
        ...


class Format(TensorNames, Protocol):
    """A foreign format. One of anything but decoders with a language-model head says so in `body` and `heads`."""

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """Our specification of a foreign configuration. Raises UnsupportedError naming what can't be had."""
        ...

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The foreign configuration of ours, or None when the format can't express it."""
        ...


ACTIVATIONS: dict[str, type[FeedForward]] = {
    "gelu": GELU,
    "gelu_new": TanhGELU,
    "gelu_pytorch_tanh": TanhGELU,
    "gelu_fast": TanhGELU,
    "relu": ReLU,
}


def plain_feedforward(name: str, width: int, *, bias: bool) -> FeedForward:
    """The network without a gate whose activation transformers calls `name`."""
    if name not in ACTIVATIONS:
        raise UnsupportedError(f"config.json asks for the activation '{name}'{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name](width=width, bias=bias)


def activation_name(feedforward: FeedForward) -> str | None:
    """transformers' name of an ungated network's activation."""
    return next((name for name, kind in ACTIVATIONS.items() if type(feedforward) is kind), None)


def format_of(config: Mapping[str, Any]) -> Format:
    """The format that a Hugging Face config.json names. Raises UnsupportedError for an unknown architecture."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ArtifactError("config.json names no model_type, so its architecture is unknown")
    if kind not in FORMATS.entries:
        raise UnsupportedError(f"unknown architecture '{kind}' in config.json{nearest(kind, FORMATS.entries)}")
    return FORMATS[kind]()


def uniform_layer(spec: ModelSpec, *, windows: bool = False, shared: bool = False) -> LayerSpec | None:
    """The layer that all of a model are like, as foreign formats have it; None where they differ or aren't `Grouped`.

    Args:
        windows: attention windows may differ; the layer is then given without one.
        shared: layers may share parameters.
    """
    found = set()
    for layer in (*spec.layers, *spec.encoder):
        shares = layer.share is not None and not shared
        if layer.position is not None or shares or not isinstance(layer.mixer, Grouped):
            return None
        mixer = replace(layer.mixer, window=None) if windows else layer.mixer
        found.add(replace(layer, mixer=mixer, cross=False, share=None))
    return found.pop() if len(found) == 1 else None


def attention_of(layer: LayerSpec) -> Grouped:
    """The layer's mixer, of a model that a foreign format expresses: all of them attend in groups of heads."""
    assert isinstance(layer.mixer, Grouped)
    return layer.mixer


def qkv_names(block: str, kind: str) -> tuple[str, str, str]:
    """Our names of a block's query, key and value weights; `kind`: "weight" or "bias"."""
    q, k, v = (f"{block}.mixer.qkv.{part}.{kind}" for part in "qkv")
    return q, k, v


def format_for(spec: ModelSpec) -> tuple[Format, dict[str, Any]]:
    """The first format that can express `spec`, and its configuration. Raises UnsupportedError if none can, naming the
    parts that have no counterpart."""
    if any(
        isinstance(layer.mixer, Grouped) and layer.mixer.layout is not None for layer in (*spec.layers, *spec.encoder)
    ):
        raise UnsupportedError("no Hugging Face architecture expresses block-sparse attention (a mixer's layout)")
    found = find_format(spec)
    if found is not None:
        return found
    from luban.models.convert.inexpressible import reason

    def name_of(other: ModelSpec) -> str | None:
        expressed = find_format(other)
        return str(expressed[1]["model_type"]) if expressed else None

    raise UnsupportedError(f"no Hugging Face architecture expresses this model: {reason(spec, name_of)}")


def find_format(spec: ModelSpec) -> tuple[Format, dict[str, Any]] | None:
    """The first format that can express `spec`, and its configuration; None where none can."""
    for name in FORMATS:
        form = FORMATS[name]()
        heads = getattr(form, "heads", None)
        known = isinstance(spec.head, heads) if heads else spec.head == LanguageModel()
        if not known or not isinstance(spec.body, getattr(form, "body", DecoderBody)):
            continue
        config = form.config(spec)
        if config is not None:
            return form, config
    return None


OLD_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # as in the first BERT


def named_as_now(form: Format, spec: ModelSpec, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Foreign tensors under the names of `pairs`: old spellings made new, and the body's prefix, which files saved
    without a head leave out, put before them."""
    for old, new in OLD_NORMS.items():
        theirs = {name.replace(old, new): tensor for name, tensor in theirs.items()}
    if theirs.keys().isdisjoint(pair.theirs for pair in form.pairs(spec)):
        theirs = {form.prefix + name: tensor for name, tensor in theirs.items()}
    return {**theirs, **_embedding(form, spec, theirs)}


def _embedding(form: Format, spec: ModelSpec, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The token embedding, where the file holds it under a name of a copy alone: of tensors that share their memory files
    keep one, and some writers keep the head's or one side's."""
    pairs = list(form.pairs(spec))
    name = next(p.theirs for p in pairs if isinstance(p, Pair) and p.ours.endswith("embedding.tokens.weight"))
    if name in theirs:
        return {}
    others = theirs.keys() - {pair.theirs for pair in pairs}
    copies = [theirs[other] for other in sorted(others) if form.ignored.fullmatch(other)]
    copies = [copy for copy in copies if copy.dim() == 2 and copy.shape[0] == spec.vocab_size]
    alike = copies and all(torch.equal(copies[0], copy) for copy in copies[1:])
    return {name: copies[0]} if alike else {}


def as_stored(form: Format, spec: ModelSpec, theirs: Mapping[str, Tensor]) -> ModelSpec:
    """The specification of what the file holds where its configuration can't tell or is wrong.

    Untied where there is an output table that isn't the embedding's: transformers 5 goes by the tensors too, whatever
    the configuration says, and writes such configurations itself. Without BERT's pooler where a body has none.
    """
    if isinstance(spec.head, Hidden) and spec.head.pool:
        pooler = [p.theirs for p in form.pairs(spec) if isinstance(p, Pair) and p.ours.startswith("head.pool")]
        return replace(spec, head=Hidden()) if theirs.keys().isdisjoint(pooler) else spec
    if not spec.tied_head:
        return spec
    untied = replace(spec, tied_head=False)
    names = {pair.ours: pair.theirs for pair in form.pairs(untied) if isinstance(pair, Pair)}
    table = names.get("head.weight", names.get("head.vocabulary.weight", ""))
    embedding = next(theirs for ours, theirs in names.items() if ours.endswith("embedding.tokens.weight"))
    held = table in theirs and embedding in theirs and theirs[table].shape == theirs[embedding].shape
    return untied if held and not torch.equal(theirs[table], theirs[embedding]) else spec


def to_ours(form: TensorNames, spec: ModelSpec, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Foreign tensors, named as now, under our names. Raises ArtifactError naming missing and surplus ones."""
    pairs = list(form.pairs(spec))
    wanted = {pair.theirs for pair in pairs}
    missing = sorted(wanted - theirs.keys())
    if missing:
        raise ArtifactError(f"the model file lacks the tensor {_few(missing)}")
    surplus = sorted(name for name in theirs.keys() - wanted if not form.ignored.fullmatch(name))
    if surplus:
        raise ArtifactError(f"the model file holds a tensor that its configuration has no place for: {_few(surplus)}")
    found = {name: tensor for pair in pairs for name, tensor in pair.split(theirs[pair.theirs]).items()}
    for pair in pairs:
        if isinstance(pair, ExpertSlice) and pair.expert == 0:
            slices = [found.pop(f"{pair.ours}[{expert}]") for expert in range(pair.experts)]
            if len({part.shape for part in slices}) > 1:
                raise ArtifactError(f"the experts' tensors like {pair.theirs} differ in shape")
            found[pair.ours] = torch.stack(slices)
    return found


def their_names(form: TensorNames, spec: ModelSpec) -> dict[str, str]:
    """Our tensor names → names in the foreign format, for error messages."""
    return {
        ours: pair.theirs
        for pair in form.pairs(spec)
        for ours in ((pair.ours,) if isinstance(pair, Pair) else pair.ours)
    }


def to_theirs(pairs: Iterable[Pair | Fused | Stacked], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of the pairs under their foreign names; one that stands under two is copied, as files share no memory."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for pair in pairs:
        tensor = pair.join(ours)
        found[pair.theirs] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
