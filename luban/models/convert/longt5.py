"""LongT5 with local attention (Guo et al. 2022, section 3.1) as Hugging Face writes it (`model_type = "longt5"`): T5, in whose
encoder a token sees `local_radius` tokens on either side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from luban.core.errors import UnsupportedError
from luban.models.convert.base import Pair, attention_of
from luban.models.convert.fields import Fields
from luban.models.convert.t5 import LM, T5
from luban.models.encoder import EncoderBody
from luban.models.layer import LayerSpec
from luban.models.spec import ModelSpec
from luban.nn.mixer.grouped import Grouped

CLASSES = {f"Long{name}": name for name in (LM, "T5Model", "T5EncoderModel")}


class LongT5(T5):
    """Every layer of the encoder has one window, the decoder has none."""

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification. Raises UnsupportedError for summaries of blocks ("transient-global") and other heads."""
        fields = Fields(config, "longt5")
        if (kind := fields.get("encoder_attention_type", "local")) != "local":
            raise UnsupportedError(
                f"config.json asks for encoder_attention_type = {kind!r}, with summaries of blocks; known is 'local'"
            )
        fields.get("global_block_size", 16)  # of those summaries
        return _with_window(super().spec(config), fields.get("local_radius", 127) + 1)

    def class_name(self, fields: Fields) -> str:
        """T5's class of the same kind."""
        name = fields.architecture(f"Long{LM}")
        if name not in CLASSES:
            raise UnsupportedError(f"config.json names the architecture {name}; known are {', '.join(CLASSES)}")
        return CLASSES[name]

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        windows = {layer.mixer.window if isinstance(layer.mixer, Grouped) else None for layer in _encoder(spec)}
        window = windows.pop()
        if windows or window is None:
            return None
        found = super().config(_with_window(spec, None))
        name = found and f"Long{found['architectures'][0]}"
        if found is None or name not in CLASSES:
            return None
        own = {"encoder_attention_type": "local", "local_radius": window - 1}
        return {**found, **own, "model_type": "longt5", "architectures": [name]}

    def pairs(self, spec: ModelSpec) -> Iterator[Pair]:
        """Tensor by tensor: the encoder's attention has another name."""
        for pair in super().pairs(spec):
            in_encoder = pair.theirs.startswith("encoder.block.")
            name = pair.theirs.replace(".SelfAttention.", ".LocalSelfAttention.") if in_encoder else pair.theirs
            yield replace(pair, theirs=name)


def _encoder(spec: ModelSpec) -> tuple[LayerSpec, ...]:
    return spec.layers if isinstance(spec.body, EncoderBody) else spec.encoder


def _with_window(spec: ModelSpec, window: int | None) -> ModelSpec:
    """The same with this window in every layer of the encoder."""
    layers = tuple(replace(layer, mixer=replace(attention_of(layer), window=window)) for layer in _encoder(spec))
    return replace(spec, layers=layers) if isinstance(spec.body, EncoderBody) else replace(spec, encoder=layers)
