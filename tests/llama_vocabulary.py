"""A tiny vocabulary with LLaMA 2's parts."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, normalizers


def llama_vocabulary() -> tokenizers.Tokenizer:
    """It puts a space before a text, drops it when joining, and spells in bytes what isn't `x`."""
    spelled = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "x", "▁x"]
    ids = {token: i for i, token in enumerate(spelled)}
    made = tokenizers.Tokenizer(models.BPE(ids, [("▁", "x")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made
