"""The special tokens of a tokenizer that Luban trains, and the names by which other houses call theirs."""

from __future__ import annotations

from luban.core.errors import ConfigError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(9))  # kept for later, some of them marks of objectives
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, SYSTEM, END, *RESERVED)  # ids 0…15, in this order


def special_tokens(reserved: int = len(RESERVED)) -> tuple[str, ...]:
    """The special tokens with so many reserved ones, in id order. Raises ConfigError below the usual nine."""
    if reserved < len(RESERVED):
        raise ConfigError(f"reserved: at least {len(RESERVED)} are needed, {reserved} given")
    return (*SPECIAL_TOKENS, *(f"<|reserved_{i}|>" for i in range(len(RESERVED), reserved)))


# What ends a turn, by the names that published chat models use.
END_OF_TURN = (END, "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|eot|>", "<|END_OF_TURN_TOKEN|>")
