"""Training rates of accelerators listed in accelerators.toml."""

from __future__ import annotations

from luban.kernels.attention_rates import RATES
from luban.planner.accelerators import Accelerator, accelerator
from luban.planner.step_time import Rates

MEASURED_ON = "h100-sxm"  # accelerator on which the attention kernels' rates were measured
SUSTAINED = 0.87  # matmul rate inside a step relative to an isolated matmul (an H100 at its power limit)
UNFUSED = 40.0, 40.0  # TFLOP/s forward, backward of attention with a materialised mask (memory-bound)


def table_rates(row: Accelerator, precision: str, kernel: str, head_dim: int) -> Rates:
    """Rates of the accelerator with this `train.precision` and attention kernel.

    Attention's rates scale with the peak of bf16 matmuls. Rates assume full-row attention; packed documents are not
    discounted.
    """
    compute = "bf16" if precision == "fp8" else precision
    scale = row.peak_flops(compute) / accelerator(MEASURED_ON).peak_flops("bf16")
    limits = [limit for name, limit in RATES if name == kernel and limit >= head_dim]
    forward, backward = RATES[kernel, min(limits)] if limits else UNFUSED
    return Rates(
        matmul=SUSTAINED * row.matmul_flops(compute),
        matmul_fp8=SUSTAINED * row.matmul_flops("fp8") if precision == "fp8" else None,
        attention_forward=1e12 * scale * forward,
        attention_backward=1e12 * scale * backward,
        bandwidth=row.copy_rate,
        full_square=not limits,
    )
