"""Builds an OpGraph: each describe method mirrors its module's forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

from luban.core.opgraph import GraphTensor, Kind, Op, OpGraph


@dataclass
class _Recorded:
    """Ops and inputs shared by all scopes of one graph."""

    ops: list[Op] = field(default_factory=list)
    inputs: list[GraphTensor] = field(default_factory=list)


class GraphBuilder:
    """Records operations of one module; `scope` returns the builder of a submodule, which records into the same graph.

    Args:
        dtype: of the matmuls, and default of all operations.
    """

    def __init__(self, dtype: str = "float32"):
        self.dtype, self.prefix, self.layer, self.shared, self.saves = dtype, "", "", False, True
        self._recorded = _Recorded()

    def scope(self, name: str, *, layer: bool = False, shared: bool = False, saves: bool = True) -> GraphBuilder:
        """The builder of the submodule `name`.

        Args:
            layer: the submodule is a Transformer layer.
            shared: its parameters are shared with an earlier module and not counted again.
            saves: its operations save something for the backward pass.
        """
        inner = GraphBuilder(self.dtype)
        inner._recorded = self._recorded
        inner.prefix = self.name(name)
        inner.layer = inner.prefix if layer else self.layer
        inner.shared = self.shared or shared
        inner.saves = self.saves and saves
        return inner

    def name(self, name: str) -> str:
        """Qualified name of a submodule; "" gives that of the module itself."""
        return ".".join(part for part in (self.prefix, name) if part)

    def input(self, name: str, shape: tuple[int, ...]) -> GraphTensor:
        """Record an int64 input of the graph, such as token ids."""
        value = GraphTensor(name, shape, "int64")
        self._recorded.inputs.append(value)
        return value

    def add(
        self,
        name: str,
        kind: Kind,
        *inputs: GraphTensor,
        shape: tuple[int, ...],
        dtype: str | None = None,
        parameters: int = 0,
        **fields: Any,
    ) -> GraphTensor:
        """Record an operation of this module.

        Args:
            name: within the module; "": the operation is the whole module.
            dtype: of the output; None: that of the matmuls.
            fields: other fields of `Op`.
        """
        if not self.saves:
            fields["saved_elements"] = 0
        op = Op(
            name=self.name(name),
            kind=kind,
            inputs=tuple(value.name for value in inputs),
            shape=shape,
            dtype=dtype or self.dtype,
            layer=self.layer,
            parameters=0 if self.shared else parameters,
            **fields,
        )
        self._recorded.ops.append(op)
        return op.output

    def linear(
        self,
        name: str,
        x: GraphTensor,
        out_features: int,
        *,
        role: str = "dense",
        bias: bool = False,
        joint: bool = False,
        saves_output: bool = True,
        kind: Kind = "linear",
        tied: bool = False,
        dtype: str | None = None,
    ) -> GraphTensor:
        """Record a matmul of the last axis of x with a weight: 2·rows·in·out FLOPs.

        Args:
            joint: this module can compute it in one matmul with its other linear maps of x.
            saves_output: a later operation needs the output in its backward pass.
            tied: the weight is shared; not counted again.
            dtype: of the output; None: that of the matmuls.
        """
        in_features = x.shape[-1]
        shape = (*x.shape[:-1], out_features)
        return self.add(
            name,
            kind,
            x,
            shape=shape,
            dtype=dtype,
            role=role,
            fusion_group=self.prefix if joint else "",
            flops=2 * x.elements * out_features,
            parameters=(0 if tied else in_features * out_features) + (out_features if bias else 0),
            saved_elements=prod(shape) if saves_output else 0,
            in_features=in_features,
            out_features=out_features,
        )

    def residual(self, name: str, *terms: GraphTensor) -> GraphTensor:
        """Record a sum of tensors of one shape, constant factors on them included. Saves nothing: the consumer saves the
        sum, and the terms aren't needed in backward."""
        return self.add(name, "add", *terms, shape=terms[0].shape)

    def graph(self, batch: int, seq: int) -> OpGraph:
        """The whole graph."""
        recorded = self._recorded
        return OpGraph(ops=tuple(recorded.ops), inputs=tuple(recorded.inputs), batch=batch, seq=seq, dtype=self.dtype)
