"""GPT-1 as Hugging Face writes it (`model_type = "openai-gpt"`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from luban.models.arrangement.post import PostNorm
from luban.models.convert.base import Fused, Pair, attention_of, uniform_layer
from luban.models.convert.decoder_head import head_pairs, read_head, write_head
from luban.models.convert.fields import Fields
from luban.models.convert.gpt2 import biased, conv_layers, plain_layernorm
from luban.models.head.hidden import Hidden
from luban.models.head.language_model import LanguageModel
from luban.models.head.rows import Classes, Value
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.plain import ReLU, TanhGELU
from luban.nn.norm import LayerNorm
from luban.nn.position.learned import Learned

ACTIVATIONS = {"gelu": TanhGELU, "relu": ReLU}  # its "gelu" is the tanh approximation


class OpenAIGPT:
    """Post-norm LayerNorm, learned positions, a feed-forward width of four times the model's."""

    ignored = re.compile(r"transformer\.(h\.\d+\.attn\.bias|position_ids)|lm_head\.weight")
    heads = (LanguageModel, Classes, Value, Hidden)
    prefix = "transformer."

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification."""
        fields = Fields(config, "openai-gpt")
        activation = fields.get("afn", "gelu")
        if activation not in ACTIVATIONS:
            fields.only("afn", "gelu")
        width = fields.need("n_embd")
        return uniform(
            vocab_size=fields.need("vocab_size"),
            width=width,
            layers=fields.need("n_layer"),
            context=fields.get("n_positions", 512),
            position=Learned(),
            arrangement=PostNorm(),
            norm=LayerNorm(eps=fields.get("layer_norm_epsilon", 1e-5)),
            mixer=biased(fields.need("n_head")),
            feedforward=ACTIVATIONS[activation](width=4 * width, bias=True),
            **read_head(fields, "OpenAIGPT", tied=True, kinds=("ForSequenceClassification", "Model")),
        )

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        layer = uniform_layer(spec)
        if layer is None:
            return None
        heads = attention_of(layer).heads
        activation = next((name for name, kind in ACTIVATIONS.items() if type(layer.feedforward) is kind), None)
        if not (
            spec.position == Learned()
            and isinstance(layer.arrangement, PostNorm)
            and plain_layernorm(spec)
            and activation
            and layer.mixer == biased(heads)
            and layer.feedforward.width == 4 * spec.width
        ):
            return None
        head = write_head(spec.head, "OpenAIGPT", "OpenAIGPTLMHeadModel")
        return head and {
            **head,
            "model_type": "openai-gpt",
            "vocab_size": spec.vocab_size,
            "n_positions": spec.context,
            "n_embd": spec.width,
            "n_layer": len(spec.layers),
            "n_head": heads,
            "afn": activation,
            "layer_norm_epsilon": layer.norm.eps,
            "tie_word_embeddings": spec.tied_head,
        }

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused]:
        """Tensor by tensor."""
        yield Pair("decoder.embedding.tokens.weight", "transformer.tokens_embed.weight")
        yield Pair("decoder.position.table.weight", "transformer.positions_embed.weight")
        yield from conv_layers(spec)
        yield from head_pairs(spec)
