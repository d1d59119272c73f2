"""x·Wᵀ + s·(x·Aᵀ)·Bᵀ with W frozen: LoRA's product added inside the matmul's output, without a copy of it.

As single operations each projection would write its product, read it again to add it, and its input would have a gradient for every
projection, added up one by one. Here B's matmul accumulates into the output and A's into the input's gradient, and projections of one
input read it together. Both directions are custom operators, which torch.compile leaves as they are: it would copy what is written in
place. (Hu et al. 2022, equation 3.)

N rows, I inputs, O outputs of all projections, O' and R' of one, R = Σ R'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor, float]  # A (R', I), B (O', R'), s


def factors_of(adapter: nn.Module) -> Factors | None:
    """What an adapter adds as a product; None: it computes something else."""
    found = getattr(adapter, "product", None)
    return None if found is None else found()


def products(adapters: nn.ModuleDict | None, sizes: Mapping[str, int]) -> list[tuple[int, Factors]] | None:
    """(first output, factors) of the adapters of these projections; None where one isn't a product, scales differ, or there is
    none.

    Args:
        sizes: projection → O', in the order in which outputs are concatenated.
    """
    found, start = [], 0
    for name, size in sizes.items():
        if adapters is not None and name in adapters:
            factors = factors_of(adapters[name])
            if factors is None:
                return None
            found.append((start, factors))
        start += size
    return found if len({factors[2] for _, factors in found}) == 1 else None


def adapted_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, added: Sequence[tuple[int, Factors]]) -> Tensor:
    """(…, I) → (…, O). The weight and the bias get no gradient.

    Args:
        added: see `products`.
    """
    a_RI = torch.cat([a for _, (a, _, _) in added]) if len(added) > 1 else added[0][1][0]
    b, starts = [b for _, (_, b, _) in added], [start for start, _ in added]
    y_NO, _ = low_rank_linear(x.flatten(0, -2), weight_OI, bias_O, a_RI, b, starts, added[0][1][2])
    return y_NO.unflatten(0, x.shape[:-1])


@torch.library.custom_op("luban::low_rank_linear", mutates_args=())
def low_rank_linear(
    x_NI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b: list[Tensor],
    starts: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs (N, O), and x·Aᵀ (N, R).

    Args:
        b: (O', R') each. starts: of their outputs in O.
    """
    y_NO, h_NR = F.linear(x_NI, weight_OI, bias_O), F.linear(x_NI, a_RI)
    row = 0
    for b_OR, start in zip(b, starts, strict=True):
        outputs, rank = b_OR.shape
        y_NO.narrow(1, start, outputs).addmm_(h_NR.narrow(1, row, rank), b_OR.t(), alpha=scale)
        row += rank
    return y_NO, h_NR


@torch.library.custom_op("luban::low_rank_linear_backward", mutates_args=())
def low_rank_linear_backward(
    grad_NO: Tensor,
    x_NI: Tensor,
    weight_OI: Tensor,
    a_RI: Tensor,
    h_NR: Tensor,
    b: list[Tensor],
    starts: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of x (N, I), A (R, I) and every B (O', R')."""
    grad_NO = grad_NO.contiguous()
    parts = [grad_NO.narrow(1, start, b_OR.shape[0]) for b_OR, start in zip(b, starts, strict=True)]
    grad_h_NR = torch.cat([part @ b_OR for part, b_OR in zip(parts, b, strict=True)], 1) * scale
    ranks = h_NR.split([b_OR.shape[1] for b_OR in b], 1)
    grads_b = [(part.t() @ rank) * scale for part, rank in zip(parts, ranks, strict=True)]
    grad_x_NI = (grad_NO @ weight_OI).addmm_(grad_h_NR, a_RI)
    return grad_x_NI, grad_h_NR.t() @ x_NI, grads_b


@low_rank_linear.register_fake
def _(x_NI, weight_OI, bias_O, a_RI, b, starts, scale):
    return x_NI.new_empty(len(x_NI), len(weight_OI)), x_NI.new_empty(len(x_NI), len(a_RI))


@low_rank_linear_backward.register_fake
def _(grad_NO, x_NI, weight_OI, a_RI, h_NR, b, starts, scale):
    return torch.empty_like(x_NI), torch.empty_like(a_RI), [torch.empty_like(b_OR) for b_OR in b]


def _save(ctx, inputs, output) -> None:
    x_NI, weight_OI, _, a_RI, b, starts, scale = inputs
    ctx.save_for_backward(x_NI, weight_OI, a_RI, output[1], *b)
    ctx.starts, ctx.scale = starts, scale


def _differentiate(ctx, grad_NO, grad_h):
    x_NI, weight_OI, a_RI, h_NR, *b = ctx.saved_tensors
    grad_x, grad_a, grads_b = low_rank_linear_backward(grad_NO, x_NI, weight_OI, a_RI, h_NR, b, ctx.starts, ctx.scale)
    return grad_x, None, None, grad_a, grads_b, None, None


low_rank_linear.register_autograd(_differentiate, setup_context=_save)
