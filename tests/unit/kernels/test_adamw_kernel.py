"""The one-pass AdamW against float64 arithmetic, and its rounding against what stochastic rounding promises.

On a CPU this runs under Triton's interpreter.
"""

import pytest
import torch
from interpreter import DEVICE, HERE, here, run_interpreted

triton = pytest.importorskip("triton", reason="triton is Linux-only")
SETTINGS = {"lr": 0.02, "decay": 0.3, "betas": (0.8, 0.999), "eps": 1e-6}


@pytest.mark.skipif(HERE, reason="runs directly")
def test_under_the_interpreter():
    run_interpreted(__file__)


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


@here
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
def test_update_is_the_papers(weights, moments, gradients):
    from luban.kernels.adamw import adamw_
    from luban.kernels.stepped import Stepped

    size = 5000 + 13  # several blocks, the last one not full
    w = torch.randn(size, device=DEVICE).to(weights)
    m, v = torch.zeros(size, device=DEVICE, dtype=moments), torch.zeros(size, device=DEVICE, dtype=moments)
    copy = torch.full((size,), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    wide, first, second = w.double(), m.double(), v.double()
    for step in range(1, 4):
        g = torch.randn(size, device=DEVICE).to(gradients)
        adamw_(
            [Stepped(w, g, m, v, scalar(float(step)), 17, copy)],
            scale=scalar(0.25),
            apply=scalar(True, torch.bool),
            **SETTINGS,
        )
        first = 0.8 * first + 0.2 * (g.double() * 0.25)
        second = 0.999 * second + 0.001 * (g.double() * 0.25).square()
        update = (first / (1 - 0.8**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-6)
        wide = wide * (1 - 0.02 * 0.3) - 0.02 * update
    exact = weights == moments == torch.float32
    torch.testing.assert_close(w.double(), wide, rtol=1e-5 if exact else 3e-2, atol=1e-6 if exact else 3e-2)
    for kept, right in ((m, first), (v, second)):
        tolerance = 1e-5 if moments is torch.float32 else 0.03
        torch.testing.assert_close(kept.double(), right, rtol=tolerance, atol=1e-6 if exact else 1e-2)
    assert (copy.double() - w.double()).abs().max() <= 2**-7 * wide.abs().max()


@here
def test_many_tensors_in_one_call_are_each_stepped_as_alone():
    """Sizes around the block's, views at odd addresses, none at all; several dtypes; two calls with other gradients."""
    from luban.kernels.adamw import BLOCK, adamw_
    from luban.kernels.stepped import Stepped

    def place(values, offset):
        """The same values at an address that is `offset` elements off an even one."""
        return torch.cat([values[:1].expand(offset) if len(values) else values[:0], values])[
            offset if len(values) else 0 :
        ]

    sizes = [1, 16, BLOCK - 1, BLOCK, 2 * BLOCK + 48, 0, 777, 5 * BLOCK]
    together, alone = [], []
    for i, size in enumerate(sizes):
        half, offset = i % 3 == 0, i % 2
        kind = torch.bfloat16 if half else torch.float32
        kinds = [kind, torch.bfloat16, kind, kind] + ([] if half else [torch.bfloat16])
        values = [torch.randn(size, device=DEVICE).to(k) for k in kinds]
        values[3].abs_()
        for found in (together, alone):
            weight, gradient, first, second, *copy = (place(v, offset) for v in values)
            found.append(Stepped(weight, gradient, first, second, scalar(float(i + 1)), i, *copy))
    for call in range(2):
        adamw_(together, scale=scalar(0.5), apply=scalar(True, torch.bool), **SETTINGS)
        for each in alone:
            adamw_([each], scale=scalar(0.5), apply=scalar(True, torch.bool), **SETTINGS)
        for a, b in zip(together, alone, strict=True):
            for x, y in zip(a, b, strict=True):
                assert x is None or isinstance(x, int) or torch.equal(x, y), (call, a.seed)
        together = [t._replace(gradient=torch.randn_like(t.gradient)) for t in together]
        alone = [b._replace(gradient=a.gradient.clone()) for a, b in zip(together, alone, strict=True)]


@here
def test_a_step_that_must_not_go_leaves_everything():
    from luban.kernels.adamw import adamw_
    from luban.kernels.stepped import Stepped

    tensors = [torch.randn(100, device=DEVICE) for _ in range(4)]
    before = [t.clone() for t in tensors]
    gradient = torch.full((100,), float("nan"), device=DEVICE)
    adamw_(
        [Stepped(tensors[0], gradient, tensors[1], tensors[2], scalar(1.0), 17, tensors[3])],
        scale=scalar(1.0),
        apply=scalar(False, torch.bool),
        **SETTINGS,
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@here
def test_rounding_is_to_a_neighbour_unbiased_and_differs_by_step_and_seed():
    """1 + 1/512 lies a quarter of the way from 1 to the next bf16 number: a quarter of the values must round up."""
    from luban.kernels.adamw import adamw_
    from luban.kernels.stepped import Stepped

    found = []
    for step, seed in ((1, 3), (2, 3), (1, 4)):
        w = torch.ones(16384, device=DEVICE, dtype=torch.bfloat16)
        g, m, v = (
            -torch.ones(16384, device=DEVICE),
            torch.zeros(16384, device=DEVICE),
            torch.zeros(16384, device=DEVICE),
        )
        adamw_(
            [Stepped(w, g, m, v, scalar(float(step)), seed)],
            scale=scalar(1.0),
            apply=scalar(True, torch.bool),
            lr=1 / 512,
            decay=0.0,
            betas=(0.0, 0.0),
            eps=0.0,
        )
        up = w == 1 + 2**-7
        assert (up | (w == 1)).all()
        assert up.float().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 16384) ** 0.5)
        found.append(up)
    for other in found[1:]:  # independent draws agree in 1/16 + 9/16 of the places
        assert (found[0] == other).float().mean().item() == pytest.approx(0.625, abs=0.03)


@here
def test_bf16_weights_follow_small_updates_that_plain_rounding_would_lose():
    from luban.kernels.adamw import adamw_
    from luban.kernels.stepped import Stepped

    w = torch.ones(4096, device=DEVICE, dtype=torch.bfloat16)
    m, v = torch.zeros(4096, device=DEVICE), torch.zeros(4096, device=DEVICE)
    for step in range(1, 41):
        adamw_(
            [Stepped(w, torch.ones(4096, device=DEVICE), m, v, scalar(float(step)), 1)],
            scale=scalar(1.0),
            apply=scalar(True, torch.bool),
            lr=1e-4,
            decay=0.0,
            betas=(0.9, 0.95),
            eps=1e-8,
        )
    assert w.float().mean().item() == pytest.approx(1 - 40e-4, abs=4e-4)  # nearest rounding would stay at 1
