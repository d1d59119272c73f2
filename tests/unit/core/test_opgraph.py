"""The graph of operations: what it refuses, how it is walked and cut."""

from __future__ import annotations

import random

import pytest

from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor, Op, OpGraph


def op(name: str, *inputs: str, layer: str = "") -> Op:
    return Op(name=name, kind="add", inputs=inputs, shape=(2, 3), dtype="float32", layer=layer, saved_elements=6)


def graph(*ops: Op) -> OpGraph:
    return OpGraph(ops=ops, inputs=(GraphTensor("x", (2, 3), "int64"),), batch=2, seq=3, dtype="float32")


def test_what_reads_the_future_or_shares_a_name_is_refused():
    with pytest.raises(ValueError, match="operation a reads b, which isn't computed before it"):
        graph(op("a", "x", "b"), op("b", "x"))
    for ops in ((op("x"),), (op("a", "x"), op("a", "x"))):
        with pytest.raises(ValueError, match="two operations or inputs named"):
            graph(*ops)


def test_a_random_graph_is_walked_and_cut_as_its_edges_say():
    size = 40
    edges = {i: sorted(random.sample(range(i), min(i, random.randint(0, 3)))) for i in range(size)}
    whole = graph(
        *(op(f"n{i}", "x", *(f"n{j}" for j in edges[i]), layer=random.choice(["", "one", "two"])) for i in range(size))
    )
    assert [reader.name for reader in whole.consumers("x")] == [f"n{i}" for i in range(size)]
    for i in range(size):
        assert [reader.name for reader in whole.consumers(f"n{i}")] == [f"n{j}" for j in edges if i in edges[j]]
    layers = whole.layers()
    assert set(layers) == {o.layer for o in whole.ops} - {""}
    for name, part in layers.items():
        assert part.ops == tuple(o for o in whole.ops if o.layer == name)
        made = {o.name for o in part.ops}
        assert {value.name for value in part.inputs} == {read for o in part.ops for read in o.inputs} - made
        assert all(value == whole.value(value.name) for value in part.inputs)
    assert whole.saved_bytes == 4 * 6 * size and whole.value("n0").elements == 6


def test_a_builder_names_what_it_records_by_module_and_layer():
    builder = GraphBuilder("bfloat16")
    x = builder.input("tokens", (2, 3)).view(2, 3, 1)
    block = builder.scope("blocks.0", layer=True)
    first = block.scope("mixer").scope("qkv").linear("q", x, 8, role="q", bias=True, joint=True)
    second = builder.scope("blocks.1", layer=True, shared=True).linear("down", first, 5, bias=True)
    builder.residual("sum", second, second)
    q, down, total = (made := builder.graph(2, 3)).ops
    assert (q.name, q.layer, q.fusion_group) == ("blocks.0.mixer.qkv.q", "blocks.0", "blocks.0.mixer.qkv")
    assert (q.shape, q.dtype, q.output_bytes, q.flops, q.parameters) == ((2, 3, 8), "bfloat16", 96, 96, 16)
    assert (down.name, down.fusion_group, down.parameters, down.flops) == ("blocks.1.down", "", 0, 2 * 6 * 8 * 5)
    assert (total.inputs, total.layer) == (("blocks.1.down", "blocks.1.down"), "") and made.consumers(down.name) == (
        total,
    )
