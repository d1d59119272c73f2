"""Dense layers: which of them write into the residual stream, and how their weights lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from luban.kernels.available import triton_runs
from luban.nn.row import is_row, multiply, multiply_row, side_by_side

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
    """The same one by one; cut from the joint product in training on a GPU, and for one row of weights laid together."""
    sizes = [layer.out_features for layer in layers]
    if trains_fused(x):
        return joint(x, *layers).split(sizes, dim=-1)
    if is_row(x, layers[0].weight) and (weight := side_by_side(tuple(layer.weight for layer in layers))) is not None:
        parts = multiply_row(x, weight).split(sizes, dim=-1)
        return tuple(p if layer.bias is None else p + layer.bias for p, layer in zip(parts, layers, strict=True))
    return tuple(layer(x) for layer in layers)


@torch.no_grad()
def lay_by_inputs(module: nn.Module) -> None:
    """Let the float32 matrices of `module` on the CPU lie input by input instead of output by output.

    Names, shapes and values stay, strides change. The product of one row with such a matrix reads it at the
    memory's full speed, as decoding one token needs (`luban.nn.row`). Embedding tables follow, as a tied output layer
    is a product. Layers that a module says are `joined` lie side by side in one block, to be read as one.
    """
    for part in module.modules():
        layers = [getattr(part, name) for name in getattr(part, "joined", ())]
        if layers and all(type(layer) is Dense and _movable(layer.weight) for layer in layers):
            weights = [layer.weight for layer in layers]
            if side_by_side(tuple(weights)) is None:
                together = torch.cat([weight.t() for weight in weights], dim=1)
                for weight, own in zip(weights, together.split([len(w) for w in weights], dim=1), strict=True):
                    weight.data = own.t()
    laid = {id(getattr(part, name)) for part in module.modules() for name in getattr(part, "joined", ())}
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)) and id(part) not in laid and _movable(part.weight):
            part.weight.data = part.weight.t().contiguous().t()


def _movable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32
