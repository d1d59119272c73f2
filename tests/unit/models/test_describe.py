"""Arithmetic about a model against torch's own counters."""

from __future__ import annotations

import ast
import inspect
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from luban import ModelSpec, build_model, describe
from luban.core import opgraph
from luban.models import describe as describe_module
from luban.models.block.parallel import Parallel
from luban.models.block.post import PostNorm
from luban.models.presets import PRESETS
from luban.nn.attention.grouped import Grouped
from luban.nn.feedforward import GELU, SwiGLU
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.learned import Learned

SPECS = {
    "llama": ModelSpec(vocab_size=101, width=48, layers=3, attention=Grouped(heads=6, kv_heads=2)),
    "gpt": ModelSpec(vocab_size=77, width=40, layers=2, position=Learned(), norm=LayerNorm(), tied_head=True,
                     attention=Grouped(heads=5, qkv_bias=True, output_bias=True, head_dim=6),
                     feedforward=GELU(width=90, bias=True)),
    "qk-norm": ModelSpec(vocab_size=64, width=32, layers=1, attention=Grouped(heads=4, qk_norm=RMSNorm()),
                         feedforward=SwiGLU(width=50)),
    "post": ModelSpec(vocab_size=31, width=24, layers=2, attention=Grouped(heads=3), block=PostNorm(),
                      embedding_norm=LayerNorm()),
    "parallel": ModelSpec(vocab_size=31, width=24, layers=2, attention=Grouped(heads=3), block=Parallel(norms=1)),
    "parallel, two norms": ModelSpec(vocab_size=31, width=24, layers=2, attention=Grouped(heads=3),
                                     block=Parallel(norms=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_flops_equal_torchs_counter(name):
    spec, (batch, seq) = SPECS[name], (2, 9)
    model = build_model(spec, device="meta")
    tokens = torch.zeros(batch, seq, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(tokens, mask=torch.ones(batch, seq, dtype=torch.bool, device="meta"))
    graph = describe(spec, batch=batch, seq=seq)
    assert graph.forward_flops == counter.get_total_flops()
    assert graph.training_flops == 3 * graph.forward_flops


@pytest.mark.parametrize("name", SPECS)
def test_parameters_equal_the_modules(name):
    spec = SPECS[name]
    model = build_model(spec, device="meta")
    assert describe(spec, batch=1, seq=1).parameters == spec.parameters == sum(p.numel() for p in model.parameters())
    layer = describe(spec, batch=1, seq=1).layers()["blocks.0"]
    assert layer.parameters == sum(p.numel() for p in model.blocks[0].parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-7b", 6_738_415_616), ("llama-13b", 13_015_864_320), ("llama-65b", 65_285_660_672),
     ("llama2-70b", 68_976_648_192), ("luban-6m", 6_819_072)],
)  # fmt: skip
def test_published_parameter_counts(name, parameters):
    assert PRESETS[name].parameters == parameters
    assert sum(p.numel() for p in build_model(PRESETS[name], device="meta").parameters()) == parameters


def test_175b_is_described_in_no_time():
    spec = ModelSpec(vocab_size=50_257, width=12_288, layers=96, context=2048, position=Learned(), norm=LayerNorm(),
                     attention=Grouped(heads=96, qkv_bias=True, output_bias=True), tied_head=True,
                     feedforward=GELU(width=49_152, bias=True))  # fmt: skip
    start = time.perf_counter()
    graph = describe(spec, batch=8, seq=2048)
    assert 1.745e11 < graph.parameters < 1.75e11
    assert graph.training_flops == pytest.approx(6 * graph.parameters * 8 * 2048, rel=0.05)
    assert set(graph.layers()) == {"embedding", "position", "norm", "readout", *(f"blocks.{i}" for i in range(96))}
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("module", [opgraph, describe_module])
def test_counting_imports_no_torch(module):
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] == "torch" for name in names)
