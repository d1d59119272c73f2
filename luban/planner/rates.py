"""The rates of an accelerator of the table in a training step."""

from __future__ import annotations

from luban.kernels.attention_rates import RATES
from luban.planner.accelerators import Accelerator, accelerator
from luban.planner.step_time import Rates

MEASURED_ON = "h100-sxm"  # the accelerator of the attention kernels' rates
SUSTAINED = 0.87  # of a single matmul's rate, for matmuls inside a step (an H100 at its power limit)
UNFUSED = 40.0, 40.0  # TFLOP/s of attention forward and backward with masks in memory, which limits it


def table_rates(row: Accelerator, precision: str, kernel: str, head_dim: int) -> Rates:
    """What the accelerator does in a second under `train.precision`, with attention by `kernel`.

    Attention's rates scale with the peak of bf16 matmuls. Work is counted over whole rows, however many documents they
    hold, and so are these rates.
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
