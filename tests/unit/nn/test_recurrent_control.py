"""A control small enough for every run: an RNN learns parity and carries it past the lengths it was trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from luban import build_model
from luban.models.recurrent import RecurrentBody
from luban.models.spec import uniform
from luban.nn.init import FanInInit
from luban.nn.recurrent.plain import RNN


def parity(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    bits = torch.randint(0, 2, (batch, length))
    return F.pad(bits, (0, 1), value=2), bits.sum(-1) % 2


def test_an_rnn_learns_parity_beyond_its_lengths():
    best = 0.0
    for seed in range(4):  # best of a few seeds, as published
        torch.manual_seed(seed)
        spec = uniform(vocab_size=3, width=32, body=RecurrentBody(layers=1, cell=RNN()), init=FanInInit(embedding=1.0))
        model = build_model(spec, seed=seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(600):
            tokens, answer = parity(64, int(torch.randint(1, 13, ())))
            loss = F.cross_entropy(model(tokens)[:, -1, :2], answer)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        tokens, answer = parity(512, 30)
        best = max(best, (model(tokens)[:, -1, :2].argmax(-1) == answer).float().mean().item())
        if best >= 0.99:
            return
    raise AssertionError(f"accuracy {best:.3f} at length 30")
