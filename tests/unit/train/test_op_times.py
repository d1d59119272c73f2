"""Times of single operations: every operation of a forward has one, by itself or as a module."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from luban import build_model, describe
from luban.models.layer import LayerSpec
from luban.models.spec import uniform
from luban.nn.feedforward.plain import GELU
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.lsh import LSH
from luban.planner.roofline import fusions, points
from luban.train.op_times import OpTimer, measured_fusions


def test_every_operation_is_timed_once_and_by_its_own_shapes():
    spec = uniform(vocab_size=50, width=16, layers=2, context=32, mixer=Grouped(heads=4, kv_heads=2))
    spec = replace(spec, layers=(*spec.layers, LayerSpec(mixer=LSH(heads=4), feedforward=GELU(width=20))))
    graph, cpu = describe(spec, batch=2, seq=24), torch.device("cpu")
    timed = points(graph, OpTimer(graph, build_model(spec).eval(), cpu))
    assert all(point.measured is not None and point.measured > 0 for point in timed)
    bare = points(graph, OpTimer(graph, None, cpu))
    assert [point.name for point in bare if point.measured is None] == ["decoder.blocks.2.mixer.attention"]


def test_fused_and_separate_computations_are_both_timed():
    sizes = {"rows": 1, "seq": 16, "width": 8, "inner": 12, "heads": 2, "head_dim": 4, "vocab": 30}
    planned = fusions(**sizes, itemsize=4)
    found = measured_fusions(planned, **sizes, device=torch.device("cpu"), dtype=torch.float32)
    assert [each.name for each in found] == [each.name for each in planned]
    assert all(each.measured is not None and each.measured > 0 for each in found)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["luban-6m", "--seq", "0"], "must be at least 1"),
        (["luban-6m", "--seq", "5000"], "more than the context of luban-6m, 1024 tokens"),
        (["luban-6m", "--no-measure"], "--flops and --bandwidth of the machine are needed"),
        (["luban-6n"], "unknown model preset 'luban-6n'"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, reason):
    from luban.cli.bench_roofline import run
    from luban.core.errors import LubanError

    with pytest.raises(LubanError, match=reason):
        run(words)


def test_the_command_prints_tables_and_writes_the_page(tmp_path, capsys):
    from luban.cli.bench_roofline import run

    run(["llama-7b", "--no-measure", "--flops", "1e15", "--bandwidth", "3e12", "--out", str(tmp_path / "page.html")])
    printed = capsys.readouterr().out
    assert "decoder.blocks.0.feedforward.down" in printed and "ridge at 333.3 FLOP/B" in printed
    assert "<svg" in (tmp_path / "page.html").read_text()
