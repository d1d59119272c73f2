"""Step times: parts by hand on a small graph, and the whole against an H100's own times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luban.kernels.attention_rates import RATES
from luban.models.describe import describe
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.planner.accelerators import accelerator
from luban.planner.memory import StepSettings
from luban.planner.step_time import Rates, predict_step
from luban.planner.table_rates import table_rates

SMALL = uniform(vocab_size=64, width=32, layers=2, mixer=Grouped(heads=2), feedforward=SwiGLU(width=48))
PLAIN = Rates(matmul=1e9, attention_forward=1e9, attention_backward=1e9, bandwidth=1e9)


def test_matmuls_and_attention_by_hand():
    graph = describe(SMALL, batch=2, seq=16)
    tokens, matrices = 32, 2 * (4 * 32 * 32 + 3 * 32 * 48) + 64 * 32
    scores = 2 * 4 * 2 * 16 * 16 * 32
    step = predict_step(graph, StepSettings(), PLAIN)
    assert step.matmul_seconds == pytest.approx(6 * tokens * matrices / 1e9)
    assert step.attention_seconds == pytest.approx(3.5 * scores / 2 / 1e9)
    square = predict_step(graph, StepSettings(), replace(PLAIN, attention_backward=2e9, full_square=True))
    assert square.attention_seconds == pytest.approx((1 + 2.5 / 2) * scores / 1e9)
    blocks = predict_step(graph, StepSettings(remat="full"), PLAIN)
    assert blocks.matmul_seconds == pytest.approx(step.matmul_seconds + 2 * tokens * (matrices - 64 * 32) / 1e9)
    fp8 = predict_step(
        describe(SMALL, batch=2, seq=16, dtype="bfloat16"), StepSettings(), replace(PLAIN, matmul_fp8=4e9)
    )
    in_blocks, head = 2 * tokens * (matrices - 64 * 32), 6 * tokens * 64 * 32
    assert fp8.matmul_seconds == pytest.approx((in_blocks * (2 / 4 + 1) + head) / 1e9)


def test_the_update_moves_its_state_and_micro_batches_multiply_the_rest():
    graph = describe(SMALL, batch=2, seq=16, dtype="bfloat16")
    n = graph.parameters
    one = predict_step(graph, StepSettings(optimizer_bytes=8 * n), PLAIN, update_flops=5e6)
    assert one.update_seconds == pytest.approx(((8 + 2 + 4 + 16) * n + 5e6) / 1e9)
    many = predict_step(
        graph, StepSettings(optimizer_bytes=8 * n, accumulates=True), PLAIN, micro_batches=4, update_flops=5e6
    )
    for part in ("matmul_seconds", "attention_seconds", "elementwise_seconds"):
        assert getattr(many, part) == pytest.approx(4 * getattr(one, part))
    assert many.update_seconds - one.update_seconds == pytest.approx((2 * 2 + 4 * 10) * n / 1e9)


# Seconds of a step of benchmarks/gpu_step.py on one H100 SXM (torch 2.11): 1.1B, batch 16 × 2,048.
APART, INSIDE = (
    {},
    {"saves_activation": False, "activation_in_matmul": True},
)  # SwiGLU as kernels of its own, or in the matmuls
MEASURED = [  # heads, precision, attention, what is set otherwise, bytes of a moment, seconds
    (32, "bf16", "cudnn", APART, 2, 0.424),
    (16, "bf16", "cudnn", APART, 2, 0.416),
    (16, "fp8", "cudnn", APART, 2, 0.357),
    (32, "bf16", "flash4", APART, 2, 0.410),
    (16, "bf16", "flash4", APART, 2, 0.417),
    (16, "fp8", "flash4", APART, 2, 0.361),
    (32, "bf16", "flash4", INSIDE, 2, 0.395),
    (16, "bf16", "flash4", INSIDE, 2, 0.399),
    (16, "fp8", "flash4", INSIDE, 2, 0.337),
    (16, "bf16", "flash4", INSIDE | {"remat": "selective"}, 2, 0.402),
    (16, "bf16", "flash4", INSIDE | {"remat": "selective"}, 4, 0.406),
    (16, "bf16", "flash4", INSIDE | {"remat": "selective", "master_weights": True}, 4, 0.408),
    (16, "bf16", "flash4", INSIDE | {"remat": "full"}, 2, 0.508),
]


@pytest.mark.parametrize(("heads", "precision", "kernel", "changed", "moments", "seconds"), MEASURED)
def test_within_fifteen_percent_of_what_a_gpu_took(heads, precision, kernel, changed, moments, seconds):
    spec = uniform(
        vocab_size=32_000,
        width=2048,
        layers=22,
        context=2048,
        mixer=Grouped(heads=heads, kv_heads=4),
        feedforward=SwiGLU(width=5632),
    )
    graph = describe(spec, batch=16, seq=2048, dtype="bfloat16")
    settings = StepSettings(
        **{"master_weights": False, "gpu_kernels": True} | changed,
        optimizer_bytes=2 * moments * graph.parameters,
    )
    rates = table_rates(accelerator("h100-sxm"), precision, kernel, 2048 // heads)
    assert rates.attention_forward == 1e12 * RATES[kernel, 2048 // heads][0]
    assert predict_step(graph, settings, rates).total == pytest.approx(seconds, rel=0.15)
