"""A matrix product added to what is there, in the product's own epilogue.

A compiler would take the sum out again to fuse it with what follows; as an operator of its own it stays one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(onto: Tensor, x: Tensor, weight_OI: Tensor) -> Tensor:
    """onto + x·weightᵀ for x (…, I) and onto (…, O); the sum is rounded once."""
    flat = added_product(onto.reshape(-1, onto.shape[-1]), x.reshape(-1, x.shape[-1]), weight_OI)
    return flat.view(onto.shape)


@torch.library.custom_op("luban::added_product", mutates_args=())
def added_product(onto_NO: Tensor, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """onto + x·weightᵀ, (N, O)."""
    return torch.addmm(onto_NO, x_NI, weight_OI.t())


@added_product.register_fake
def _(onto_NO, x_NI, weight_OI):
    return onto_NO.new_empty(onto_NO.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx, dy_NO):
    x_NI, weight_OI = ctx.saved_tensors
    return dy_NO, dy_NO @ weight_OI, dy_NO.t() @ x_NI


added_product.register_autograd(_differentiate, setup_context=_save)
