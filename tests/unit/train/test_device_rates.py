"""Which attention a prediction counts on; the machine is made up."""

from __future__ import annotations

import pytest
import torch

from luban.kernels import dispatch
from luban.models.encoder import EncoderBody
from luban.models.spec import uniform
from luban.nn.mixer.grouped import Grouped
from luban.train.device_rates import attention_kernel


@pytest.mark.parametrize(("installed", "expected"), [(True, "flash4"), (False, "luban")])
def test_packed_rows_are_predicted_on_the_kernel_that_serves_them(monkeypatch, installed, expected):
    monkeypatch.delenv("LUBAN_ATTENTION", raising=False)
    monkeypatch.setattr(dispatch, "flash4_missing", lambda: None if installed else "not installed")
    monkeypatch.setattr(dispatch, "INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))

    def path(documents=True, window=None, **fields):
        spec = uniform(vocab_size=100, width=256, layers=1, context=64, mixer=Grouped(heads=2, window=window), **fields)
        return attention_kernel(torch.device("cuda"), "bf16", spec, documents)

    assert path() == expected
    assert path(window=8) == path(body=EncoderBody()) == "luban"
    assert path(documents=False) == ("flash4" if installed else "cudnn")
    assert path(documents=False, body=EncoderBody()) == ("flash4" if installed else "cudnn")
