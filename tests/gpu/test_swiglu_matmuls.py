"""Matmuls that end in SwiGLU, beside the same computed in float32."""

import pytest
import torch
import torch.nn.functional as F

from luban.kernels import gated

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or gated.missing() is not None, reason="needs a CUDA GPU and quack-kernels"
)


def error(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return float((mine.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sides", [(1000, 256, 688, 256), (37, 128, 176, 64), (4096, 1024, 2816, 1024)])
def test_products_with_swiglu_agree_with_float64(dtype, sides):
    rows, width, inner, outputs = sides
    draw = {"device": "cuda", "dtype": dtype}
    x, gate, up, down = (
        torch.randn(shape, **draw) / shape[1] ** 0.5 * scale
        for shape, scale in (
            ((rows, width), width**0.5),
            ((inner, width), 1),
            ((inner, width), 1),
            ((outputs, inner), 1),
        )
    )
    dy = torch.randn(rows, outputs, **draw)

    def gradients(of, kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, gate, up, down)]
        out = of(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dy.to(kind))]

    plain = lambda x, gate, up, down: (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()  # noqa: E731
    exact = gradients(plain, torch.float64)
    naive = gradients(plain, dtype)
    mine = gradients(lambda x, gate, up, down: gated.gated_matmuls(x, gated.paired(gate, up), down)[0], dtype)
    for name, a, b, c in zip(("out", "x", "gate", "up", "down"), mine, naive, exact, strict=True):
        assert error(a, c) <= 2 * error(b, c), name


def test_who_is_served():
    assert gated.serves("cuda", torch.bfloat16, torch.bfloat16, 2048, 5632) == (
        torch.cuda.get_device_capability()[0] == 9
    )
    assert not gated.serves("cuda", torch.float32, torch.float32, 2048, 5632)
    assert not gated.serves("cuda", torch.bfloat16, torch.float32, 2048, 5632)
    assert not gated.serves("cuda", torch.bfloat16, torch.bfloat16, 2048, 5630)
