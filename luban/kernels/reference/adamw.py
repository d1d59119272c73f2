"""AdamW in plain PyTorch, one tensor at a time: the kernel's reference, used where Triton isn't available."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luban.kernels.stepped import Stepped


def stochastic_bf16(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round fp32 values stochastically to bf16, same shape: up with probability (dropped 16 bits) / 2¹⁶ (Gupta et al. 2015,
    section 3.2)."""
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = (values.contiguous().view(torch.int32) + noise) & -(1 << 16)
    rounded = torch.where(values.isfinite(), bits.view(torch.float32), values)
    return rounded.to(torch.bfloat16)


@torch.no_grad()
def adamw_(
    tensors: Sequence[Stepped],
    *,
    scale: Tensor,
    apply: Tensor,
    lr: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One AdamW step in place, like `luban.kernels.adamw.adamw_`.

    Args:
        tensors: weight, gradient and both moments, of one shape each; see `Stepped`.
        scale: () float32, factor on the gradients. apply: () bool, false to skip the step.
        lr: learning rate. decay: weight decay. betas: decay of both moments. eps: added to the root.
    """
    if not apply:
        return
    for weight, gradient, first, second, steps, seed, copy in tensors:
        g, m, v, w = gradient.float() * scale, first.float(), second.float(), weight.float()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        step = float(steps)
        root = (v / (1 - betas[1] ** step)).sqrt() + eps
        w = w * (1 - lr * decay) - lr * (m / (1 - betas[0] ** step)) / root
        generator = torch.Generator(weight.device).manual_seed(seed + 3 * int(step))
        for kept, value in ((weight, w), (first, m), (second, v)):
            kept.copy_(value if kept.dtype == torch.float32 else stochastic_bf16(value, generator))
        if copy is not None:
            copy.copy_(w)
