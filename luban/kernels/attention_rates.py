"""Measured speed of the attention kernels, by which one is chosen and steps are predicted. No torch."""

from __future__ import annotations

# TFLOP/s forward and backward on one H100 (torch 2.11), 16,384 tokens a batch, rows of 8,192, heads × width = 2,048:
# (kernel, head width up to) → (forward, backward). A bias or intervals leave only kernels that can serve them.
# Above 128 nothing was measured: there the figures only say which to try first.
RATES = {
    ("flash4", 64): (540, 534),
    ("flash4", 128): (678, 598),
    ("cudnn", 64): (454, 422),
    ("cudnn", 128): (605, 520),
    ("luban", 64): (439, 385),
    ("luban", 128): (574, 439),
    ("luban", 256): (150, 60),
    ("flash2", 64): (293, 263),
    ("flash2", 128): (318, 294),
    ("flash2", 256): (300, 200),
}
# The same for packed documents (mean 512 tokens of exponential length, 8 rows of 8,192), visible pairs alone
# counted. FlashAttention-4's tiles begin with every document, Luban's stand where the row puts them.
PACKED_RATES = {
    ("flash4", 64): (204, 233),
    ("flash4", 128): (292, 280),
    ("luban", 64): (281, 253),
    ("luban", 128): (331, 266),
}
