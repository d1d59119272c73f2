"""Memory prediction by arithmetic."""

from __future__ import annotations

from luban.core.opgraph import Op, OpGraph
from luban.planner.memory import predict_memory


def test_every_part_is_counted_by_hand():
    graph = OpGraph(ops=(Op(name="a", kind="linear", parameters=100, activation=60),
                         Op(name="b", kind="norm", parameters=10, activation=7)), batch=2, seq=5)  # fmt: skip
    full = predict_memory(graph, vocab_size=50, optimizer=880, half=False)
    assert (full.parameters, full.gradients, full.optimizer) == (440, 440, 880)
    assert (full.activations, full.logits) == (4 * 67, 2 * 4 * 2 * 5 * 50)
    assert full.total == 440 + 440 + 880 + 268 + 4000
    half = predict_memory(graph, vocab_size=50, optimizer=880, half=True)
    assert (half.parameters, half.gradients, half.activations) == (660, 660, 134)
    assert "activations 134 B" in str(half)
