"""Special tokens of tokenizers that Luban trains, end-of-turn tokens of published chat models, and roles of turns."""

from __future__ import annotations

from luban.core.errors import ConfigError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(9))  # reserved for objectives (masks, sentinels) and later use
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, SYSTEM, END, *RESERVED)  # ids 0…15, in this order


def special_tokens(reserved: int = len(RESERVED)) -> tuple[str, ...]:
    """The special tokens with `reserved` reserved ones, in id order. Raises ConfigError for fewer than nine."""
    if reserved < len(RESERVED):
        raise ConfigError(f"reserved: at least {len(RESERVED)} are needed, {reserved} given")
    return (*SPECIAL_TOKENS, *(f"<|reserved_{i}|>" for i in range(len(RESERVED), reserved)))


# End-of-turn tokens of Luban's tokenizers and of published chat models.
END_OF_TURN = (END, "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|eot|>", "<|END_OF_TURN_TOKEN|>")

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")  # of a conversation's turns


def unknown_role(role: object) -> str:
    """The error message for a role that is not in ROLES."""
    return f"unknown role {role!r} in a conversation (known: {', '.join(ROLES)})"
