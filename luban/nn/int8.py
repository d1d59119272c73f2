"""Linear maps with weights in 8 bits for inference on a CPU, where decoding one token costs what reading the weights costs; for a
GPU see `luban.nn.scaled_weight`.

I inputs, O outputs. A weight row is stored as round(w / scale) with scale = max|w| / 127, one scale an output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError

if TYPE_CHECKING:
    from luban.nn.roles import Role

PackedKind = Callable[
    [Tensor, "Tensor | None"], nn.Module
]  # weight (O, I) and bias (O,) → a module that multiplies with them
LARGEST = 127
KERNEL_STEP = 16  # inputs that torch's kernel reads at once: with a remainder its result is wrong
MOST_ROWS = 8  # that torch's kernel takes in less time than unpacking the weights


class Int8Weight(nn.Module):
    """x·wᵀ·scale (+ bias).

    A few rows of input run through torch's 8-bit kernel, which takes them in bfloat16; more through a float32 matmul with the
    weights unpacked. So do few where the number of inputs is no multiple of 16.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        super().__init__()
        weight_OI = weight_OI.detach()
        largest = weight_OI.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        scale_O = (largest / LARGEST).bfloat16()
        packed = (weight_OI / scale_O.float()[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8).contiguous()
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(scale_O, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=False)
        self.parameter_roles: dict[str, Role] = {"weight": "dense", "scale": "bias", "bias": "bias"}

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O), in the precision of the input."""
        weight, scale_O = self.weight, self.scale
        rows = x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1])
        if rows.shape[0] == 0:
            return x.new_empty(*x.shape[:-1], weight.shape[0])
        if rows.shape[0] <= MOST_ROWS and rows.shape[1] % KERNEL_STEP == 0:
            out = torch._weight_int8pack_mm(rows.bfloat16(), weight, scale_O).to(x.dtype)
        else:
            out = F.linear(rows, weight.to(x.dtype) * scale_O.to(x.dtype)[:, None])
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], -1)


@torch.no_grad()
def pack_for_inference(module: nn.Module, kind: str = "int8") -> None:
    """Pack the weights of every owner inside `module` into 8 bits, in place; embeddings and norms stay as they are.

    A tied output layer gets packed weights of its own.

    Args:
        kind: "int8", or "fp8" on a GPU that has it.

    Raises ConfigError, UnsupportedError for a device on which the kind isn't served.
    """
    from luban.nn.float8 import require_float8
    from luban.nn.linear import matmul_owners
    from luban.nn.scaled_weight import Float8Scaled, Int8Scaled

    device = next(module.parameters()).device
    if kind == "fp8":
        require_float8(device, "use --dtype int8 or bfloat16")
    elif device.type not in ("cpu", "cuda"):
        raise ConfigError(f"int8 weights run on a CPU or a CUDA GPU, not on {device}")
    packed: PackedKind = Float8Scaled if kind == "fp8" else Int8Scaled if device.type == "cuda" else Int8Weight
    for _, owner in list(matmul_owners(module)):
        owner.pack(packed)
