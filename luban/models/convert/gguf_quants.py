"""GGUF's number formats → float32, block by block at once (layouts: ggml's block structs).

N blocks; every function takes the blocks' bytes (N, bytes) uint8 and returns (N, numbers a block) float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luban.core.errors import MissingExtra


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


def scaled_groups(raw: Tensor, groups: Tensor) -> Tensor:
    """(N, 8, 32) numbers, each group by its 6-bit scale and minimum over a scale and minimum of all: the first 16 bytes."""
    packed = raw[:, 4:16]
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (rest & 15) | (first >> 6 << 4)), dim=1).float()
    minima = torch.cat((second & 63, (rest >> 4) | (second >> 6 << 4)), dim=1).float()
    scaled = (half(raw[:, 0:2]) * scales)[..., None] * groups
    return (scaled - (half(raw[:, 2:4]) * minima)[..., None]).flatten(1)


def q4_k(raw: Tensor) -> Tensor:
    """8 groups of 32 nibbles, each with a 6-bit scale and minimum, over a scale and minimum of all."""
    return scaled_groups(raw, nibbles(raw[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def fifth_bits(raw: Tensor) -> Tensor:
    """(N, 4) bytes → (N, 32): bit i of each, worth 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)
    return ((raw[..., None] >> shifts & 1) << 4).flatten(1)


def q5_0(raw: Tensor) -> Tensor:
    """A scale and 32 numbers of 5 bits around 16, the fifth bits apart."""
    return half(raw[:, :2]) * (nibbles(raw[:, 6:]) + fifth_bits(raw[:, 2:6]) - 16)


def q5_1(raw: Tensor) -> Tensor:
    """A scale, a minimum and 32 numbers of 5 bits."""
    return half(raw[:, :2]) * (nibbles(raw[:, 8:]) + fifth_bits(raw[:, 4:8])) + half(raw[:, 2:4])


def pairs_of_bits(raw: Tensor) -> Tensor:
    """(N, 64) bytes → (N, 256) numbers of 2 bits: in each half, the lowest bits of 32 bytes first."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=raw.device)[:, None]
    return (raw.reshape(-1, 2, 1, 32) >> shifts & 3).flatten(1)


def q2_k(raw: Tensor) -> Tensor:
    """16 groups of 16 numbers of 2 bits, each with a scale and a minimum of 4 bits over a scale and minimum of all."""
    groups = pairs_of_bits(raw[:, 16:80]).reshape(-1, 16, 16).float()
    scales, minima = half(raw[:, 80:82]) * (raw[:, :16] & 15), half(raw[:, 82:84]) * (raw[:, :16] >> 4)
    return (scales[..., None] * groups - minima[..., None]).flatten(1)


def q3_k(raw: Tensor) -> Tensor:
    """16 groups of 16 numbers of 3 bits around 4, the third bits apart, each with a scale of 6 bits around 32."""
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)[:, None]
    third = (raw[:, None, :32] >> shifts & 1).flatten(1).float()  # bit i of the 32 bytes: numbers 32·i to 32·i + 31
    numbers = pairs_of_bits(raw[:, 32:96]).float() + 4 * third - 4
    low, high = raw[:, 96:104], raw[:, 104:108]
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
    scales = half(raw[:, 108:110]) * ((torch.cat((low & 15, low >> 4), dim=1) | high << 4).float() - 32)
    return (scales[..., None] * numbers.reshape(-1, 16, 16)).flatten(1)


def q5_k(raw: Tensor) -> Tensor:
    """Q4_K with a fifth bit, group i's in bit i of 32 bytes."""
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)[:, None]
    fifth = (raw[:, None, 16:48] >> shifts & 1).float() * 16  # (N, 8, 32)
    groups = nibbles(raw[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) + fifth
    return scaled_groups(raw, groups)


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


def by_package(name: str) -> Callable[[Tensor], Tensor]:
    """Of the rarer formats, whose tables the gguf package has. Raises MissingExtra where it isn't installed."""

    def numbers(raw: Tensor) -> Tensor:
        try:
            from gguf import GGMLQuantizationType, quants
        except ImportError:
            raise MissingExtra("gguf", "corpus", f"reading tensors stored as {name}") from None
        made = quants.dequantize(raw.numpy(), GGMLQuantizationType[name])
        return torch.from_numpy(np.ascontiguousarray(made, dtype=np.float32))

    return numbers


QUANTS = {  # by ggml's number of the type
    0: Quant("F32", 1, 4, lambda raw: raw.contiguous().view(torch.float32)),
    1: Quant("F16", 1, 2, half),
    2: Quant("Q4_0", 32, 18, q4_0),
    3: Quant("Q4_1", 32, 20, q4_1),
    6: Quant("Q5_0", 32, 22, q5_0),
    7: Quant("Q5_1", 32, 24, q5_1),
    8: Quant("Q8_0", 32, 34, q8_0),
    10: Quant("Q2_K", 256, 84, q2_k),
    11: Quant("Q3_K", 256, 110, q3_k),
    12: Quant("Q4_K", 256, 144, q4_k),
    13: Quant("Q5_K", 256, 176, q5_k),
    14: Quant("Q6_K", 256, 210, q6_k),
    28: Quant("F64", 1, 8, lambda raw: raw.contiguous().view(torch.float64).float()),
    30: Quant("BF16", 1, 2, lambda raw: raw.contiguous().view(torch.bfloat16).float()),
    **{
        kind: Quant(name, block, size, by_package(name))
        for kind, name, block, size in (
            (16, "IQ2_XXS", 256, 66),
            (17, "IQ2_XS", 256, 74),
            (18, "IQ3_XXS", 256, 98),
            (19, "IQ1_S", 256, 50),
            (20, "IQ4_NL", 32, 18),
            (21, "IQ3_S", 256, 110),
            (22, "IQ2_S", 256, 82),
            (23, "IQ4_XS", 256, 136),
            (29, "IQ1_M", 256, 56),
            (34, "TQ1_0", 256, 54),
            (35, "TQ2_0", 256, 66),
            (39, "MXFP4", 32, 17),
        )
    },
}
KNOWN = {15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}  # named in refusals
