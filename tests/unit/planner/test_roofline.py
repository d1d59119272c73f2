"""Rooflines: bytes and bounds by hand, attention's traffic against FlashAttention's formulas, the page."""

from __future__ import annotations

import random
import re

import pytest

from luban import describe
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.hyena import Hyena
from luban.planner.roofline import Roof, attention_traffic, fusions, moved_bytes, points, table, traffic_orders
from luban.report.roofline import roofline_page

SPEC = uniform(
    vocab_size=100, width=32, layers=3, context=64, mixer=Grouped(heads=4, kv_heads=2), feedforward=SwiGLU(width=48)
)


def test_bytes_are_inputs_weights_and_output_and_alike_operations_are_one_point():
    graph = describe(SPEC, batch=2, seq=16, dtype="bfloat16")
    by_name = {point.name: point for point in points(graph)}
    tokens = 2 * 16
    q = by_name["decoder.blocks.0.mixer.qkv.q"]
    assert (q.count, q.flops, q.bytes) == (3, 2 * tokens * 32 * 32, 2 * (2 * tokens * 32 + 32 * 32))
    attention = by_name["decoder.blocks.0.mixer.attention"]
    assert attention.bytes == 2 * tokens * (32 + 16 + 16 + 32)
    assert attention.flops == 4 * 2 * 16 * 16 * 32 // 2  # the causal half
    lookup = by_name["decoder.embedding.tokens"]
    assert lookup.bytes == 8 * tokens + 2 * 2 * tokens * 32  # ids; rows read and written
    assert sum(point.count for point in by_name.values()) == len(graph.ops)
    assert {moved_bytes(op, graph) > 0 for op in graph.ops} == {True}


def test_the_ridge_parts_what_memory_bounds_from_what_matmuls_bound():
    graph = describe(SPEC, batch=2, seq=16)
    for point in points(graph):
        roof = Roof(flops=1e12, bandwidth=1e12 / (point.intensity or 1) * random.choice([0.5, 2]))
        wanted = "memory" if point.intensity < roof.ridge else "compute"
        assert point.bound(roof) == wanted
        least = roof.seconds(point.flops, point.bytes)
        assert least == max(point.flops / roof.flops, point.bytes / roof.bandwidth)
        assert (least == point.bytes / roof.bandwidth) == (wanted == "memory")


def test_counted_traffic_grows_as_the_formulas_say():
    """PAPERS: at N = 1024, d = 64, M = 25,600 elements 1.68e5 against 1.11e6, 6.6 times fewer."""
    separate, tiled = traffic_orders(1024, 64, 25_600)
    assert separate == pytest.approx(1.11e6, rel=0.01) and tiled == pytest.approx(1.68e5, rel=0.01)
    assert separate / tiled == pytest.approx(6.6, abs=0.05)
    # N²d²/M is what comes with every block of keys; with long rows and blocks that divide them nothing else counts.
    for _ in range(5):
        d, columns = random.choice([32, 64, 128]), random.choice([64, 128, 256])
        n, memory = 2**15, 4 * d * columns
        counted, formula = attention_traffic(n, d, memory)[1], n**2 * d**2 / memory
        assert counted / formula == pytest.approx(4 * (3 + 4 / d), rel=0.02)
    for n in (2**12, 2**14):
        assert attention_traffic(n, 64, 25_600)[0] / traffic_orders(n, 64, 25_600)[0] == pytest.approx(4, rel=0.01)


def test_fusing_saves_what_lies_between_operations():
    found = {each.name: each for each in fusions(2, 1024, 64, 128, 4, 16, 1000, 2)}
    roof = Roof(flops=1e15, bandwidth=1e9)  # bound by memory everywhere
    assert found["SwiGLU"].predicted(roof) == pytest.approx(8 / 3)
    assert found["norm"].predicted(roof) == pytest.approx(7 / 2)
    attention = found["attention"]
    assert attention.separate_bytes - attention.fused_bytes == 2 * 4 * 2 * 4 * 1024**2 - 4 * 2 * 4 * 1024
    bound = Roof(flops=1.0, bandwidth=1e30)
    assert found["loss"].predicted(bound) == 1.0  # matmuls bind both


def test_the_page_holds_table_and_picture():
    graph = describe(uniform(vocab_size=50, width=16, layers=1, context=32, mixer=Hyena()), seq=32)
    rows = points(graph, lambda op: 1e-3 if op.kind == "mixing" else None)
    roof = Roof(flops=1e11, bandwidth=1e10)
    page = roofline_page("A <model>", rows, fusions(1, 32, 16, 64, 2, 8, 50, 4), "traffic", roof, "here")
    shown = [point for point in rows if point.flops]
    assert page.count("<circle") == len(shown) + sum(point.measured is not None for point in shown)
    assert "A &lt;model&gt;" in page and "<script" not in page and "http" not in page
    assert all(point.name in table(rows, roof) for point in rows)


@pytest.mark.parametrize("faster", [1.0, 1e6])
def test_the_table_has_times_of_any_size_and_their_sum(faster):
    roof = Roof(flops=1e11 * faster, bandwidth=1e10 * faster)
    graph = describe(uniform(vocab_size=50, width=16, layers=3, context=32, mixer=Hyena()), seq=32)
    rows = points(graph, lambda op: 1e-3 / faster)
    *lines, whole = table(rows, roof).splitlines()[1:]
    assert len(lines) == len(rows)
    unit = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}
    times = [
        [float(n) * unit[u] for n, u in re.findall(r"([\d.]+(?:e[+-]\d+)?) (s|ms|µs|ns)\b", line)]
        for line in (*lines, whole)
    ]
    by_name = {row.name: row for row in rows}
    for line, (least, measured) in zip(lines, times, strict=False):
        row = by_name[line.split()[0]]
        assert least == pytest.approx(roof.seconds(row.flops, row.bytes), rel=1e-3) and least > 0
        assert measured == pytest.approx(1e-3 / faster)
    assert (
        sum(row.count for row in rows) == len(graph.ops) == int(whole.removeprefix("all, one after another").split()[0])
    )
    assert times[-1] == pytest.approx(
        [sum(row.count * roof.seconds(row.flops, row.bytes) for row in rows), len(graph.ops) * 1e-3 / faster], rel=1e-3
    )
    assert "1 ms" not in table(points(graph), roof), "nothing was measured"
