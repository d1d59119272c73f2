"""What a model does to a batch, as data: a graph of operations with shapes, FLOPs, parameters and saved activations.

Planners and solvers are written over this graph. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

TRAINING_FACTOR = 3  # one forward, and a backward with two matmuls for each of its matmuls
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}  # bytes of an element, by dtype

Kind = Literal[
    "embedding",  # rows of a table looked up, or added to its input
    "bias",  # position bias added to attention scores
    "linear",  # matmul with a weight
    "attention",  # softmax(q·kᵀ)·v, and everything positions do to q, k and scores
    "norm",
    "activation",  # of a feed-forward network, multiplied with `up` where it is gated
    "add",  # residual connection
    "concat",
    "recurrent",  # all time steps of a recurrent layer
    "lm_head",  # matmul with the output embedding
]


@dataclass(frozen=True)
class GraphTensor:
    """A tensor in the graph: what an operation returns, or an input of the whole graph."""

    name: str  # of the operation that returns it, or of the input
    shape: tuple[int, ...]
    dtype: str  # as torch names it: "float32", "bfloat16", "int64", …

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def view(self, *shape: int) -> GraphTensor:
        """The same tensor in another shape."""
        return GraphTensor(self.name, shape, self.dtype)


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation. It returns one tensor, which other operations refer to by this operation's name.

    Operations with parameters are named after the module that owns these ("decoder.blocks.3.mixer.qkv.q"). Views, casts,
    and element-wise work without a name of its own (rotations, tanh of a pooler) belong to the operation that reads
    their result.
    """

    name: str  # unique in its graph
    kind: Kind
    inputs: tuple[
        str, ...
    ]  # names of the operations or graph inputs that it reads; of attention: q, k, v, then the bias
    shape: tuple[int, ...]  # of what it returns
    dtype: str  # of what it returns
    role: str = ""  # of the weight that it reads, one of `luban.nn.roles.ROLES`; "": it reads none
    layer: str = ""  # the Transformer layer that it belongs to, such as "decoder.blocks.3"; "": it stands outside
    joint: str = ""  # the module that may compute it in one matmul with others of the same input; "": none
    flops: int = 0  # of one forward, a multiply-add counted as two
    parameters: int = 0  # scalars that it owns; those shared with an earlier operation are counted there
    saved: int = 0  # elements that it saves for the backward pass
    in_features: int = 0  # of linear and lm_head
    out_features: int = 0  # of linear and lm_head
    density: float = 1.0  # of attention: fraction of queries × keys that the mask leaves
    heads: int = 0  # of attention: query heads
    key_heads: int = 0  # of attention: heads of keys and values
    head_dim: int = 0  # of attention

    @property
    def output(self) -> GraphTensor:
        """The tensor that it returns."""
        return GraphTensor(self.name, self.shape, self.dtype)

    @property
    def output_bytes(self) -> int:
        """Bytes of what it returns."""
        return ITEMSIZE[self.dtype] * prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class OpGraph:
    """A model's operations for one batch, in an order in which they can run.

    Raises:
        ValueError: two operations or inputs share a name, or an operation reads what nothing before it returns.
    """

    ops: tuple[Op, ...]
    inputs: tuple[GraphTensor, ...]  # of the whole graph
    batch: int  # sequences
    seq: int  # tokens a sequence
    dtype: str  # of the matmuls

    def __post_init__(self):
        known = {value.name for value in self.inputs}
        for op in self.ops:
            if missing := [name for name in op.inputs if name not in known]:
                raise ValueError(f"operation {op.name} reads {', '.join(missing)}, which nothing before it returns")
            if op.name in known:
                raise ValueError(f"there are two operations or inputs named {op.name}")
            known.add(op.name)

    @property
    def itemsize(self) -> int:
        """Bytes of an element in the dtype of the matmuls."""
        return ITEMSIZE[self.dtype]

    @property
    def forward_flops(self) -> int:
        """FLOPs of one forward of the batch."""
        return sum(op.flops for op in self.ops)

    @property
    def training_flops(self) -> int:
        """FLOPs of one forward and backward of the batch (3 × forward)."""
        return TRAINING_FACTOR * self.forward_flops

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs a token."""
        return self.training_flops / (self.batch * self.seq)

    @property
    def model_flops(self) -> float:
        """Training FLOPs that the model needs: 3 × forward, of attention only what its mask leaves.

        For a causal decoder this is tokens × (6·(matrices without the input embedding) + 6·layers·heads·head dim·T):
        what utilisation refers to. Norms' scales, a few parts in 10⁵ of the usual 6·parameters, and what is computed
        again in the backward pass don't count; borders of documents in a pack don't take anything off.
        """
        return TRAINING_FACTOR * sum(op.flops * op.density for op in self.ops)

    @property
    def parameters(self) -> int:
        """Scalars in the model; shared weights counted once."""
        return sum(op.parameters for op in self.ops)

    @property
    def saved_bytes(self) -> int:
        """Bytes that a forward with fused attention saves for the backward pass when nothing is recomputed."""
        return self.itemsize * sum(op.saved for op in self.ops)

    @cached_property
    def _values(self) -> dict[str, GraphTensor]:
        return {value.name: value for value in (*self.inputs, *(op.output for op in self.ops))}

    @cached_property
    def _consumers(self) -> dict[str, tuple[Op, ...]]:
        found: dict[str, list[Op]] = {name: [] for name in self._values}
        for op in self.ops:
            for name in dict.fromkeys(op.inputs):
                found[name].append(op)
        return {name: tuple(ops) for name, ops in found.items()}

    def value(self, name: str) -> GraphTensor:
        """The tensor of this name: an input of the graph, or what the operation of this name returns."""
        return self._values[name]

    def consumers(self, name: str) -> tuple[Op, ...]:
        """The operations that read the tensor of this name, in order."""
        return self._consumers[name]

    def layers(self) -> dict[str, OpGraph]:
        """Name of each Transformer layer → its part of the graph, in order."""
        cut: dict[str, list[Op]] = {}
        for op in self.ops:
            if op.layer:
                cut.setdefault(op.layer, []).append(op)
        return {layer: self.part(ops) for layer, ops in cut.items()}

    def part(self, ops: Iterable[Op]) -> OpGraph:
        """These operations of the graph, in its order, as a graph whose inputs are what they read from the rest."""
        ops = tuple(ops)
        made = {op.name for op in ops}
        read = dict.fromkeys(name for op in ops for name in op.inputs if name not in made)
        inputs = tuple(self.value(name) for name in read)
        return OpGraph(ops=ops, inputs=inputs, batch=self.batch, seq=self.seq, dtype=self.dtype)


def mask_density(seq: int, window: int | None, *, causal: bool) -> float:
    """Fraction of queries × keys that a mask leaves, the diagonal halved: a causal mask leaves ½, whatever the length.

    Args:
        window: slots that a token sees before it, itself included (and after it, where not causal); none: all.
    """
    band = min(seq if window is None else window, seq) / seq
    return (1 if causal else 2) * band * (1 - band / 2)
