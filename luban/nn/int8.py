"""Dense layers with weights in 8 bits for inference on a CPU, where decoding one token costs what reading the weights costs.

I inputs, O outputs. A weight row is stored as round(w / scale) with scale = max|w| / 127, one scale an output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.nn.linear import Dense

LARGEST = 127
KERNEL_STEP = 16  # inputs that torch's kernel reads at once: with a rest it computes something else, unasked


class Int8Linear(nn.Module):
    """x·wᵀ·scale (+ bias).

    One row of input runs through torch's 8-bit kernel, which takes it in bfloat16; more rows through a
    float32 product with the weights unpacked, which is the faster from two rows on. So does one row where the inputs
    aren't a multiple of 16.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        super().__init__()
        largest = weight_OI.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        scale_O = (largest / LARGEST).bfloat16()
        packed = (weight_OI / scale_O.float()[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8).contiguous()
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(scale_O, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O), in the precision of the input."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] == 1 and rows.shape[1] % KERNEL_STEP == 0:
            out = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).to(x.dtype)
        else:
            out = F.linear(rows, self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None])
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], -1)


class Int8Readout(Int8Linear):
    """The same as an output layer."""

    def forward(self, hidden: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, E) → (…, V); the embedding table isn't read."""
        return super().forward(hidden)


@torch.no_grad()
def pack_int8(module: nn.Module, table: Tensor) -> None:
    """Replace every dense layer inside `module` by its 8-bit form, in place; embeddings and norms stay.

    Layers that a module says are `joined` are packed as one, its `fused`.

    Args:
        table: the embedding table, which a tied output layer multiplies with; it gets packed weights of its own.

    Raises ConfigError off the CPU.
    """
    if table.device.type != "cpu":
        raise ConfigError(f"int8 weights run on the CPU alone, not on {table.device}")
    layers = {name: getattr(module, name) for name in getattr(module, "joined", ())}
    if layers and all(type(layer) is Dense for layer in layers.values()):
        biases = [layer.bias for layer in layers.values()]
        together = None if biases[0] is None else torch.cat(biases)
        module.fused = Int8Linear(torch.cat([layer.weight for layer in layers.values()]), together)
        for name in layers:
            setattr(module, name, None)
    for name, child in module.named_children():
        if name == "readout" and not list(child.children()):
            weight = child.weight if isinstance(child, nn.Linear) else table
            setattr(module, name, Int8Readout(weight, getattr(child, "bias", None)))
        elif type(child) in (nn.Linear, Dense):
            setattr(module, name, Int8Linear(child.weight, child.bias))
        else:
            pack_int8(child, table)
