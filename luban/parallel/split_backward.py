"""A stage's backward pass in two: first the gradients of its inputs, later those of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

WeightPass = Callable[[], object]  # adds the weights' gradients to `.grad`


def input_gradients(
    outputs: list[Tensor],
    gradients: list[Tensor] | None,
    inputs: list[Tensor],
    weights: Mapping[str, nn.Parameter],
    *,
    chain: bool,
) -> tuple[Sequence[Tensor | None], WeightPass]:
    """Gradients of the inputs, and what is left to do.

    Args:
        gradients: of the outputs; None: the output is the loss.
        chain: every weight acts on what comes from the inputs, so that torch can go on where it stopped. Else (a decoder's
            first layers don't read the encoder's states) the second half goes through the whole graph again.
    """
    held = [weight for weight in weights.values() if weight.requires_grad]
    if inputs and chain:
        from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

        found, groups = stage_backward_input(outputs, gradients, inputs, iter(held))  # type: ignore[arg-type]
        return found, lambda: stage_backward_weight(iter(held), groups)
    found = torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True) if inputs else ()
    return found, lambda: _backward(outputs, gradients, held)


def _backward(outputs: list[Tensor], gradients: list[Tensor] | None, weights: list[nn.Parameter]) -> None:
    found = torch.autograd.grad(outputs, weights, gradients, allow_unused=True)
    for weight, gradient in zip(weights, found, strict=True):
        if gradient is not None:
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
