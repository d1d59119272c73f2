"""Sizes that the kernels keep to and that predictions of memory and time must know. No torch."""

from __future__ import annotations

LOGIT_BYTES = 2**29  # of logits at once where linear layer and cross-entropy are one kernel
CHUNK_ELEMENTS = 2**26  # logits at once elsewhere: 256 MB in float32
IGNORED = -100  # a target that counts nothing
BLOCK_SIDES = (16, 32, 64, 128)  # of a layout's blocks, in tokens
FLOAT8_SIDES = 16  # both sides of a weight must be multiples of it for matmuls in 8-bit floating point
PAIRED_SIDES = 16  # and for matmuls that end in SwiGLU
WIDEST_ROW = 16384  # values of a row that one program holds
LARGEST_SQUARE = 2**24  # scores that one layer may keep for the backward pass where they are written out: 64 MB in fp32
QUERY_CHUNKS, SMALLEST_CHUNK = 8, 64  # queries are then taken in so many pieces, none smaller


def fits_float8(*sides: int) -> bool:
    """True if a weight of this shape is supported by fp8 matmuls."""
    return not any(side % FLOAT8_SIDES for side in sides)


def fits_float8_swiglu(width: int, inner: int) -> bool:
    """True if a feed-forward network of these widths is supported by the fp8 SwiGLU kernel, which quantises by rows."""
    return fits_float8(width, inner) and inner <= WIDEST_ROW


def query_chunk(queries: int) -> int:
    """Queries taken at once where attention's scores are written out."""
    return max(SMALLEST_CHUNK, -(-queries // QUERY_CHUNKS))
