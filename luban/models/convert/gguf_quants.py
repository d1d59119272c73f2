"""GGUF's number formats → float32, block by block at once (layouts: ggml's block structs).

N blocks; every function takes the blocks' bytes (N, bytes) uint8 and returns (N, numbers a block) float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def half(raw: Tensor) -> Tensor:
    """(N, 2n) bytes → (N, n) numbers stored in half precision."""
    return raw.contiguous().view(torch.float16).float()


def nibbles(raw: Tensor) -> Tensor:
    """(…, n) bytes → (…, 2n) float32: all low halves, then all high halves."""
    return torch.cat((raw & 0x0F, raw >> 4), dim=-1).float()


def q8_0(raw: Tensor) -> Tensor:
    """A scale and 32 signed bytes."""
    return half(raw[:, :2]) * raw[:, 2:].contiguous().view(torch.int8).float()


def q4_0(raw: Tensor) -> Tensor:
    """A scale and 32 nibbles around 8."""
    return half(raw[:, :2]) * (nibbles(raw[:, 2:]) - 8)


def q4_1(raw: Tensor) -> Tensor:
    """A scale, a minimum and 32 nibbles."""
    return half(raw[:, :2]) * nibbles(raw[:, 4:]) + half(raw[:, 2:4])


def q4_k(raw: Tensor) -> Tensor:
    """8 groups of 32 nibbles, each with a 6-bit scale and minimum, over a scale and minimum of all."""
    packed = raw[:, 4:16]
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (rest & 15) | (first >> 6 << 4)), dim=1).float()
    minima = torch.cat((second & 63, (rest >> 4) | (second >> 6 << 4)), dim=1).float()
    groups = nibbles(raw[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    scaled = (half(raw[:, 0:2]) * scales)[..., None] * groups
    return (scaled - (half(raw[:, 2:4]) * minima)[..., None]).flatten(1)


def q6_k(raw: Tensor) -> Tensor:
    """256 numbers of 6 bits around 32, four bits here and two there; a signed 8-bit scale for every 16 of them."""
    low = raw[:, :128].reshape(-1, 2, 64)
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    quarters = torch.cat((low & 0x0F, low >> 4), dim=-1).reshape(-1, 2, 4, 32)
    numbers = (quarters | ((high & 3) << 4)).float() - 32
    scales = half(raw[:, 208:210]) * raw[:, 192:208].contiguous().view(torch.int8).float()
    return (scales[..., None] * numbers.reshape(-1, 16, 16)).flatten(1)


@dataclass(frozen=True)
class Quant:
    """A number format."""

    name: str
    block: int  # numbers a block
    bytes: int  # bytes a block
    numbers: Callable[[Tensor], Tensor]


QUANTS = {  # by ggml's number of the type
    0: Quant("F32", 1, 4, lambda raw: raw.contiguous().view(torch.float32)),
    1: Quant("F16", 1, 2, half),
    30: Quant("BF16", 1, 2, lambda raw: raw.contiguous().view(torch.bfloat16).float()),
    8: Quant("Q8_0", 32, 34, q8_0),
    2: Quant("Q4_0", 32, 18, q4_0),
    3: Quant("Q4_1", 32, 20, q4_1),
    12: Quant("Q4_K", 256, 144, q4_k),
    14: Quant("Q6_K", 256, 210, q6_k),
}
KNOWN = {
    6: "Q5_0",
    7: "Q5_1",
    10: "Q2_K",
    11: "Q3_K",
    13: "Q5_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}  # named in refusals
