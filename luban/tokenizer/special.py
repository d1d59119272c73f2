"""The special tokens of a tokenizer that Luban trains, and the names by which other houses call theirs."""

from __future__ import annotations

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(9))
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, SYSTEM, END, *RESERVED)  # ids 0…15, in this order

# What ends a turn, by the names that published chat models use.
END_OF_TURN = (END, "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|eot|>", "<|END_OF_TURN_TOKEN|>")
