"""Held-out bits per byte: the model as a compressor, beside gzip and xz on the same bytes."""

from __future__ import annotations

import gzip
import lzma
import math

import torch

from luban.core.errors import DataError
from luban.evals.likelihood import negative_log_likelihood, reading_length, windows
from luban.evals.task import Material, Outcome
from luban.load.model import LoadedModel
from luban.models.base import require_next_token


class BitsPerByte:
    """Bits the model needs for each UTF-8 byte of the held-out documents, their end tokens included.

    Documents are scored one by one, in id order, each from its BOS, in windows of `bits_per_byte_context` tokens that start
    half a window apart (a longer window gives fewer bits); the compressors get the same documents
    concatenated in the same order as one stream (`gzip -9`, `xz -9e`).
    """

    needs = "text"

    def run(self, model: LoadedModel, material: Material, *, limit: int, precision: str) -> Outcome:
        documents = sorted(material.text, key=lambda d: d.id)[: limit or None]
        stream = "".join(d.text for d in documents).encode()
        if not stream:
            raise DataError("bits_per_byte needs held-out text: the corpus has no plain held-out document")
        context = reading_length(model)
        cut, owner, tokenizer = [], [], model.need_tokenizer()
        for index, token_ids in enumerate(tokenizer.encode_batch([d.text for d in documents])):
            ids = [i for i in (tokenizer.bos_id, *token_ids, tokenizer.eos_id) if i is not None]
            parts = list(windows(ids, [True] * len(ids), context, max(1, context // 2)))
            cut += parts
            owner += [index] * len(parts)
        require_next_token(model.spec, "scoring text")
        nats = negative_log_likelihood(model.module, cut, precision=getattr(torch, precision), title="bits per byte")
        by_document = [0.0] * len(documents)
        for index, value in zip(owner, nats, strict=True):
            by_document[index] += value
        items = [
            {"id": d.id, "bytes": len(d.text.encode()), "bits_per_byte": n / math.log(2) / max(1, len(d.text.encode()))}
            for d, n in zip(documents, by_document, strict=True)
        ]
        figures = {"bits_per_byte": sum(nats) / math.log(2) / len(stream), "bits_per_byte_context": context}
        return Outcome(figures | compressors(stream), items)


def compressors(stream: bytes) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz -9e` need for one stream."""
    gz = len(gzip.compress(stream, 9, mtime=0))
    xz = len(lzma.compress(stream, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))
    return {
        "gzip_bits_per_byte": gz * 8 / len(stream),
        "xz_bits_per_byte": xz * 8 / len(stream),
        "heldout_bytes": len(stream),
    }
