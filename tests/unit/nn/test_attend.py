"""Attention written out in matmuls, as compiled training on a CPU computes it, against the library's in float64."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from luban.nn.attention.attend import _written_out
from luban.nn.attention.prepared_mask import PreparedMask


@pytest.mark.parametrize("masked", ["bare triangle", "documents", "everything", "a bias a head"])
@pytest.mark.parametrize("length", [1, 64, 130, 300])
def test_products_equal_the_definition(masked, length):
    B, K, D, group = 2, random.choice([1, 2, 3]), random.choice([8, 20]), random.choice([1, 2, 4])
    q, k, v = (torch.randn(B, heads, length, D, requires_grad=True) for heads in (K * group, K, K))
    slots = torch.arange(length)
    triangle = slots[:, None] >= slots
    documents = (torch.rand(B, length) < 0.1).cumsum(1)
    same = triangle & (documents[:, :, None] == documents[:, None, :])
    mask = {
        "bare triangle": None,
        "documents": torch.where(same, 0.0, float("-inf"))[:, None],
        "everything": None,
        "a bias a head": torch.where(triangle, torch.randn(1, K * group, length, length), float("-inf")),
    }[masked]
    bare, backward_only = masked == "bare triangle", masked != "everything"
    out = _written_out(q, k, v, PreparedMask(causal=bare, dense=mask, backward_only=backward_only), 0.3)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(
        *wide, attn_mask=None if mask is None else mask.double(), is_causal=bare, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-5)
    do = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), do), torch.autograd.grad(wanted, wide, do.double()), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)


def test_what_is_marked_as_looking_back_does():
    from luban.kernels.attention_mask import AttentionMask
    from luban.nn.attention.prepared_mask import prepare

    device = torch.device("cpu")
    prefix = torch.tensor([[True, True, True, False, False, False]])
    cases = {
        "causal": {},
        "window": {"window": 2},
        "documents": {"documents": torch.tensor([[0, 0, 0, 1, 1, 1]])},
        "prefix": {"prefix": prefix},
        "both ways": {"causal": False},
    }
    for name, options in cases.items():
        visible = AttentionMask(**({"queries": 6, "keys": 6, "causal": True, "device": device} | options))
        made = prepare(visible, head_dim=8, dtype=torch.float32)
        ahead = torch.ones(6, 6, dtype=torch.bool).triu(1)
        assert made.backward_only == (name not in ("prefix", "both ways"))
        assert not (made.backward_only and made.dense is not None and (made.dense[..., ahead] > float("-inf")).any())
