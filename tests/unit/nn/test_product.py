"""The attention product against a plain computation in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from luban.nn.attention.mask import Scores
from luban.nn.attention.product import attend


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3),
])  # fmt: skip
@pytest.mark.parametrize("masked", [True, False])
def test_it_is_softmax_attention_and_so_are_its_gradients(dtype, tolerance, masked):
    """Tolerances: a few units in the last place of the inputs' type."""
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    if masked:
        documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    weight = torch.randn(2, 4, 9, 8)
    rounded = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in rounded]
    mask = torch.where(seen, 0.0, float("-inf")).to(dtype) if masked else None
    ours = attend(*rounded, Scores(causal=not masked, mask=mask))
    keys, values = (t.repeat_interleave(2, dim=1) for t in exact[1:])
    scores = (exact[0] @ keys.mT / math.sqrt(8)).masked_fill(~seen, float("-inf"))
    theirs = scores.softmax(-1) @ values
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    (ours.double() * weight).sum().backward()
    (theirs * weight).sum().backward()
    for a, b in zip(rounded, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=2 * tolerance, atol=2 * tolerance)
