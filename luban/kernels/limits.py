"""Sizes that the kernels keep to and that predictions of memory and time must know. No torch."""

from __future__ import annotations

LOGIT_BYTES = 2**29  # of logits at once where linear layer and cross-entropy are one kernel
CHUNK_ELEMENTS = 2**26  # logits at once elsewhere: 256 MB in float32
IGNORED = -100  # a target that counts nothing
FLOAT8_SIDES = 16  # both sides of a weight must be multiples of it for products in 8-bit floating point
