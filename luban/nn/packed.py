"""Frozen weights in 8 or 4 bits that gradients pass through: int8 by rows, and QLoRA's 4-bit NormalFloat with double
quantisation (Dettmers et al. 2023, sections 3 and 4, appendix E).

I inputs, O outputs, N = O·I numbers of a weight.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.nn.int8 import PackedKind
from luban.nn.roles import HIDDEN

BLOCK = 64  # numbers that share a scale
SCALES = 256  # scales that share a scale of their own
LARGEST = 127  # of int8
LARGEST_FLOAT8 = 448.0  # of float8 e4m3, in which scales are kept
OFFSET = 0.9677083  # 1 − ½·(1/30 + 1/32): the outermost quantile, so that it is finite


@lru_cache(maxsize=1)
def normal_float() -> tuple[float, ...]:
    """The 16 values of NF4: quantiles of the standard normal distribution at equal steps, eight of the positive half, seven of
    the negative one and 0, divided by the largest."""
    half = torch.tensor(0.5, dtype=torch.float64)
    positive = torch.special.ndtri(torch.linspace(OFFSET, half.item(), 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(OFFSET, half.item(), 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, half.new_zeros(1), positive]).sort().values
    return tuple((values / values.max()).tolist())


class Packed(nn.Module):
    """Base class: x·wᵀ (+ bias) with a weight that is unpacked for each matmul, in the backward pass again."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None):
        super().__init__()
        self.shape = tuple(weight_OI.shape)
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().clone(), persistent=False)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) unpacked."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O), in the precision of the input."""
        y = _UnpackedLinear.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _UnpackedLinear(torch.autograd.Function):
    """Saves nothing but the packed weight."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.weight(x.dtype))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        (d_y,) = gradients
        return d_y @ ctx.packed.weight(d_y.dtype), None


class Int8Rows(Packed):
    """round(w / scale), scale = max|w| / 127 of every row."""

    numbers: Tensor
    scale: Tensor

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        super().__init__(weight_OI, bias_O)
        wide = weight_OI.detach().float()
        scale_O = wide.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
        self.register_buffer("numbers", (wide / scale_O[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale_O, persistent=False)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(O, I)."""
        return (self.numbers.float() * self.scale.float()[:, None]).to(dtype)


class NF4(Packed):
    """Two 4-bit indices a byte, a scale for 64 numbers; scales less their mean in float8, with a float32 scale for 256 of them:
    4.127 bits a number."""

    indices: Tensor
    scales: Tensor
    scale_of_scales: Tensor
    mean: Tensor

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        super().__init__(weight_OI, bias_O)
        numbers = weight_OI.detach().float().flatten()
        blocks = F.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(dim=1)
        mean = largest.mean()
        groups = F.pad(largest - mean, (0, -len(largest) % SCALES)).view(-1, SCALES)
        outer = groups.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_FLOAT8
        self.register_buffer("scales", (groups / outer[:, None]).to(torch.float8_e4m3fn), persistent=False)
        self.register_buffer("scale_of_scales", outer, persistent=False)
        self.register_buffer("mean", mean, persistent=False)
        # by the scales as they will be read, so that the nearest value is the nearest to what comes out
        normed = blocks / self._largest().clamp_min(torch.finfo(torch.float32).tiny)[: len(blocks), None]
        values = torch.tensor(normal_float(), device=normed.device)
        index = torch.bucketize(normed, (values[1:] + values[:-1]) / 2).to(torch.uint8).view(-1, 2)
        self.register_buffer("indices", index[:, 0] << 4 | index[:, 1], persistent=False)
        self.register_buffer("values", values, persistent=False)

    def _largest(self) -> Tensor:
        """The scale of every block; rounding can't make that of nearly zero numbers negative."""
        scales = (self.scales.float() * self.scale_of_scales.float()[:, None]).flatten() + self.mean.float()
        return scales.clamp_min(0.0)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(O, I)."""
        index = torch.stack([self.indices >> 4, self.indices & 15], dim=-1).view(-1, BLOCK).int()
        values: Tensor = self.values  # type: ignore[assignment]
        blocks = values.float()[index] * self._largest()[: len(index), None]
        rows, columns = self.shape
        return blocks.flatten()[: rows * columns].view(rows, columns).to(dtype)


KINDS: dict[str, PackedKind] = {"int8": Int8Rows, "nf4": NF4}


def packed_kind(module: nn.Module) -> str | None:
    """How the matrices of the layers inside `module` are packed: a name of KINDS, "other" (for inference alone), or None where they
    aren't."""
    from luban.nn.linear import matmul_owners

    held = [part for _, owner in matmul_owners(module) if owner.packed is not None for part in owner.packed.values()]
    if not held:
        return None
    return next((name for name, kind in KINDS.items() if all(type(part) is kind for part in held)), "other")


@torch.no_grad()
def pack_frozen(module: nn.Module, kind: PackedKind) -> None:
    """Pack the matrices of the layers inside `module`, in place; embeddings, norms and the head stay as they are.

    Raises ConfigError for weights that are trained.
    """
    from luban.nn.linear import matmul_owners

    for name, owner in list(matmul_owners(module)):
        held = list(owner.projections().values())
        if not all(projection.parameter_roles["weight"] in HIDDEN for projection in held):
            continue
        if any(parameter.requires_grad for projection in held for parameter in projection.parameters(recurse=False)):
            raise ConfigError(
                f"{name} is trained, so its weights can't be packed: leave it out of adapter.modules_to_save"
            )
        owner.pack(kind)
