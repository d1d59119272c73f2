"""Start tokens of an encoder–decoder's targets in Hugging Face configurations."""

from __future__ import annotations

from typing import Any

from luban.models.convert.fields import Fields
from luban.models.encoder_decoder import EncoderDecoderBody


def encoder_decoder(fields: Fields, *, start: int) -> EncoderDecoderBody:
    """The body; `start` where the configuration names no decoder_start_token_id."""
    usual = start if start < fields.need("vocab_size") else None
    return EncoderDecoderBody(
        decoder_start=fields.get("decoder_start_token_id", usual, int),
        decoder_second=fields.get("forced_bos_token_id", None, int),
    )


def decoder_start(body: EncoderDecoderBody) -> dict[str, Any]:
    """The configuration's fields."""
    named = {"decoder_start_token_id": body.decoder_start, "forced_bos_token_id": body.decoder_second}
    return {name: token for name, token in named.items() if token is not None}
