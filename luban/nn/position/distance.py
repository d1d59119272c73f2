"""Position methods that add to the scores what depends on the distance alone, looked up in a table of all distances.

B batch, T queries, S keys, H heads.
"""

from __future__ import annotations

from torch import Tensor

from luban.nn.position.family import PositionMethod, PositionShape


class DistancePositions(PositionMethod):
    """Looks up the bias of every pair; a method says what it is in `distance_bias`."""

    def __init__(self, shape: PositionShape):
        super().__init__()
        self.heads, self.context, self.causal = shape.heads, shape.context, shape.causal

    def bias(self, query_positions_BT: Tensor, key_positions_BS: Tensor) -> Tensor:
        """(B, H, T, S) float32. Positions must lie below the context, or below the number of keys."""
        reach = max(self.context, key_positions_BS.shape[-1])
        bias = self.distance_bias(reach, key_positions_BS.device)
        distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
        return bias.table()[:, distance_BTS + bias.zero].transpose(0, 1)
