"""What a foreign format is, and the table of those there are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from luban.core.errors import ArtifactError, UnsupportedError, nearest
from luban.core.registry import Registry
from luban.models.decoder import DecoderBody
from luban.models.head import LanguageModel
from luban.models.spec import ModelSpec

FORMATS = Registry(
    "model type",
    {
        "llama": "luban.models.convert.llama:Llama",
        "mistral": "luban.models.convert.mistral:Mistral",
        "qwen2": "luban.models.convert.qwen2:Qwen2",
        "qwen3": "luban.models.convert.qwen3:Qwen3",
        "bert": "luban.models.convert.bert:Bert",
        "roberta": "luban.models.convert.roberta:Roberta",
        "albert": "luban.models.convert.albert:Albert",
    },
)


@dataclass(frozen=True)
class Pair:
    """One tensor of ours and the one that holds it in the foreign file."""

    ours: str
    theirs: str


class Format(Protocol):
    """A foreign format. `ignored` matches tensors of theirs that hold nothing (caches, masks).

    A format of anything but decoders with a language-model head says so in `body` and `heads`.
    """

    ignored: re.Pattern[str]

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """Our specification of a foreign configuration. Raises UnsupportedError naming what can't be had."""
        ...

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The foreign configuration of ours, or None when the format can't express it."""
        ...

    def pairs(self, spec: ModelSpec) -> Iterator[Pair]:
        """Every tensor of ours with its foreign name."""
        ...


@dataclass(frozen=True)
class Fields:
    """A foreign configuration being read: which fields were looked at, and clear errors for missing ones."""

    values: Mapping[str, Any]
    kind: str = field(default="")

    def need(self, name: str) -> Any:
        """A field that must be there."""
        if self.values.get(name) is None:
            raise ArtifactError(f"config.json of this {self.kind} model lacks '{name}'")
        return self.values[name]

    def get(self, name: str, default: Any) -> Any:
        """A field, or the format's own default where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def only(self, name: str, supported: Any) -> None:
        """Refuse a field whose value changes the computation in a way that isn't built."""
        if self.get(name, supported) != supported:
            raise UnsupportedError(f"config.json asks for {name} = {self.values[name]!r}; "
                                   f"only {supported!r} is supported")  # fmt: skip


def format_of(config: Mapping[str, Any]) -> Format:
    """The format that a Hugging Face config.json names. Raises UnsupportedError for an unknown architecture."""
    kind = config.get("model_type")
    if kind not in FORMATS.entries:
        raise UnsupportedError(f"unknown architecture '{kind}' in config.json{nearest(str(kind), FORMATS.entries)}")
    return FORMATS[kind]()


def format_for(spec: ModelSpec) -> tuple[Format, dict[str, Any]]:
    """The first format that can express `spec`, and its configuration. Raises UnsupportedError if none can."""
    for name in FORMATS:
        form = FORMATS[name]()
        body, heads = getattr(form, "body", DecoderBody), getattr(form, "heads", (LanguageModel,))
        if type(spec.body) is not body or not isinstance(spec.head, heads):
            continue
        config = form.config(spec)
        if config is not None:
            return form, config
    raise UnsupportedError(f"no Hugging Face architecture expresses this model (known: {', '.join(FORMATS)})")


def to_ours(form: Format, spec: ModelSpec, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Foreign tensors under our names. Raises ArtifactError naming missing and surplus ones."""
    pairs = list(form.pairs(spec))
    wanted = {pair.theirs for pair in pairs}
    missing = sorted(wanted - theirs.keys())
    if missing:
        raise ArtifactError(f"the model file lacks the tensor {_few(missing)}")
    surplus = sorted(name for name in theirs.keys() - wanted if not form.ignored.fullmatch(name))
    if surplus:
        raise ArtifactError(f"the model file holds a tensor that its config.json has no place for: {_few(surplus)}")
    return {pair.ours: theirs[pair.theirs] for pair in pairs}


def to_theirs(form: Format, spec: ModelSpec, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their foreign names; one that stands under two is copied, as files share no memory."""
    named = {pair.theirs: pair.ours for pair in form.pairs(spec)}
    first = {mine: theirs for theirs, mine in reversed(named.items())}
    return {theirs: ours[mine] if first[mine] == theirs else ours[mine].clone() for theirs, mine in named.items()}


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
