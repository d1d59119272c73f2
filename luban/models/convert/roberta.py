"""RoBERTa as Hugging Face writes it (`model_type = "roberta"`): BERT whose positions begin behind two unread rows."""

from __future__ import annotations

import re
from typing import Any

from luban.core.errors import UnsupportedError
from luban.models.convert.bert import Bert
from luban.models.convert.fields import Fields
from luban.models.encoder import EncoderBody
from luban.models.head.base import Head
from luban.models.head.masked_lm import MaskedLM
from luban.models.spec import ModelSpec
from luban.nn.feedforward.plain import GELU
from luban.nn.position.learned import Learned

PADDING = 1  # its padding id: the first position is the row behind it


class Roberta(Bert):
    """One segment, positions from row 2, no pair output."""

    ignored = re.compile(r".*position_ids|lm_head\.decoder\..*|roberta\.pooler\..*")
    model_type = "roberta"
    name = "Roberta"
    prefix = "roberta."
    masked_lm = (("head.transform", "lm_head.dense"), ("head.norm", "lm_head.layer_norm"))
    vocabulary_bias = "lm_head.bias"
    pooler = ("head.pool", "roberta.pooler.dense")
    vocabulary = "lm_head.decoder"
    classes = (("head.pool", "classifier.dense"), ("head.output", "classifier.out_proj"))

    def context(self, fields: Fields) -> int:
        """The table's rows but those before position 0."""
        return fields.get("max_position_embeddings", 514) - self.offset(fields)

    def offset(self, fields: Fields) -> int:
        """Rows before position 0."""
        return fields.get("pad_token_id", PADDING) + 1

    def positions(self, fields: Fields) -> Learned:
        """A table with unread rows in front."""
        return Learned(offset=self.offset(fields))

    def head(self, fields: Fields) -> Head:
        """Its masked-LM head always uses GELU, and it has no pair output."""
        head = super().head(fields)
        if isinstance(head, MaskedLM):
            if head.pair:
                raise UnsupportedError("RoBERTa has no second output for pairs")
            return MaskedLM(activation=None if fields.get("hidden_act", "gelu") == "gelu" else "gelu")
        return head

    def fits(self, spec: ModelSpec) -> bool:
        """Unread rows before position 0, no pair output."""
        layer = spec.layers[0]
        assert isinstance(spec.body, EncoderBody) and isinstance(spec.position, Learned)
        plain = spec.body.embeddings is None and spec.position.offset > 0
        if isinstance(spec.head, MaskedLM):
            exact = spec.head.activation == "gelu" or isinstance(layer.feedforward, GELU)
            return plain and not spec.head.pair and exact
        return plain

    def own(self, spec: ModelSpec) -> dict[str, Any]:
        """The padding id, which says where positions begin."""
        assert isinstance(spec.position, Learned)
        return {"pad_token_id": spec.position.offset - 1}
