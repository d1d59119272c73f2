"""Dense layers: which of them write into the residual stream, and how their weights lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from luban.kernels.available import triton_runs
from luban.nn.row import multiply

Multiply = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # (…, I), (O, I), (O,) → (…, O)


class Dense(nn.Linear):
    """x·weightᵀ (+ bias), by a product that can be another than torch's own."""

    multiply: Multiply = staticmethod(multiply)  # a precision policy replaces it in place
    plain = True  # whether it is still torch's own

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        return self.multiply(x, self.weight, self.bias)


def residual_linear(inputs: int, outputs: int, *, bias: bool) -> Dense:
    """A dense layer whose output is added to the residual stream; initialisations may scale it by depth."""
    layer = Dense(inputs, outputs, bias=bias)
    layer.writes_residual = True
    return layer


def trains_fused(x: Tensor) -> bool:
    """Whether this is training where the kernels run that fold small operations into products."""
    return torch.is_grad_enabled() and triton_runs(x)


def joint(x: Tensor, *layers: Dense) -> Tensor:
    """What several layers make of one input, side by side: (…, I) → (…, sum of O), as one product.

    The input is read once, and its gradient is one product instead of several and their sum. Copying the weights
    together costs far less.
    """
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return layers[0].multiply(x, weight, bias)


def parallel(x: Tensor, *layers: Dense) -> tuple[Tensor, ...]:
    """The same one by one; in training on a GPU cut from the joint product."""
    if trains_fused(x):
        return joint(x, *layers).split([layer.out_features for layer in layers], dim=-1)
    return tuple(layer(x) for layer in layers)


@torch.no_grad()
def lay_by_inputs(module: nn.Module) -> None:
    """Let the float32 matrices of `module` on the CPU lie input by input instead of output by output.

    Names, shapes and values stay, strides change. The product of one row with such a matrix reads it at the
    memory's full speed, as decoding one token needs (`luban.nn.row`). Embedding tables follow, as a tied output layer
    is a product. Every matrix keeps a block of its own: side by side in one they would have gaps, over which torch's
    fused optimizers write.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            weight = part.weight
            if weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.t().is_contiguous():
                weight.data = weight.t().contiguous().t()
