"""Adapters beside the fused kernels: loss and the gradient of every trained parameter are those of the plain path.

The fused path runs under Triton's interpreter, in a separate process.
"""

from __future__ import annotations

import random

import pytest
import torch
from counted import Kernels
from interpreter import DEVICE, HERE, here, run_interpreted

from luban.adapters.base import AdapterConfig
from luban.adapters.dora import DoRA
from luban.adapters.ia3 import IA3
from luban.adapters.llama_adapter import LLaMAAdapter
from luban.adapters.lora import LoRA
from luban.adapters.parallel import Parallel
from luban.adapters.pissa import PiSSA
from luban.adapters.prefix import PrefixTuning
from luban.adapters.prompt import PromptTuning
from luban.adapters.series import Houlsby
from luban.load.adapted import put_in
from luban.models.build import build_model, state_of
from luban.models.spec import uniform
from luban.nn import linear
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.lm_head import Vocabulary
from luban.nn.mixer.grouped import Grouped
from luban.objectives.causal import Causal

SPEC = uniform(vocab_size=37, width=16, layers=1, mixer=Grouped(heads=2, kv_heads=1), feedforward=SwiGLU(width=24))
KINDS: dict[str, AdapterConfig] = {
    "lora": LoRA(rank=3),
    "lora and the head": LoRA(rank=3, targets=("q", "gate"), modules_to_save=("lm_head",)),
    "pissa": PiSSA(rank=2),
    "dora": DoRA(rank=3),
    "ia3": IA3(),
    "houlsby": Houlsby(width=4),
    "parallel": Parallel(width=4),
    "llama adapter": LLaMAAdapter(length=3),
    "prefix": PrefixTuning(length=3, network=8),
    "prompt": PromptTuning(length=3),
}


@pytest.mark.skipif(HERE, reason="runs directly")
def test_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is Linux-only")
    run_interpreted(__file__)


@here
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_the_plain_path(name, monkeypatch):
    torch.manual_seed(random.SystemRandom().randrange(2**31))
    config, model = KINDS[name], build_model(SPEC, seed=random.randrange(1000))
    weights = state_of(model)
    config.adapt(twin := build_model(SPEC, device="meta"))
    saved = {n: weights[n] for n, p in twin.named_parameters() if p.requires_grad and n in weights}
    put_in(model, config, config.initial(SPEC, weights, 1) | saved, "test")
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.to(DEVICE)
    tokens = torch.randint(0, 37, (1, 8), device=DEVICE)
    mask = torch.rand(1, 7, device=DEVICE) < 0.8
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": mask,
        "documents": None,
        "positions": None,
    }
    found = []
    for fused in (True, False):
        model.zero_grad()
        if not fused:
            monkeypatch.setattr(linear, "trains_fused", lambda x: False)
            monkeypatch.setattr(linear, "products", lambda *_: None)
            monkeypatch.setattr(Vocabulary, "linear_cross_entropy", lambda *_: None)
        with Kernels() as kernels:
            loss = Causal().loss(model)(batch).sum
            loss.backward()
        assert bool(kernels.calls) == fused
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for ours, right in zip(*found, strict=True):
        # rounding of float32 sums, relative to the largest number of each tensor
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4 * max(1.0, right.abs().max().item()))
