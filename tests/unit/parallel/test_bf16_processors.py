"""Processors without instructions for bf16: named in training, and passed over by the demo."""

from __future__ import annotations

import pytest
import torch

from luban.demo import run as demo
from luban.parallel.device import multiplies_bf16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "native"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64"}, True),
    ],
)
def test_by_the_processors_capabilities(monkeypatch, found, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert multiplies_bf16(CPU) == native and multiplies_bf16(torch.device("cuda"))
    if not torch.cuda.is_available():
        sizes = demo._sizes()
        assert (sizes.training, sizes.precision) == (("bf16", "bfloat16") if native else ("fp32", "float32"))
