"""An operation graph of a model's forward: shapes, FLOPs, parameters, saved activations.

Planners read this graph. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

TRAINING_FACTOR = 3  # one forward, and a backward with two matmuls for each of its matmuls
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}  # dtype → bytes per element

Kind = Literal[
    "embedding",  # embedding lookup, or learned positions added
    "bias",  # position bias added to attention scores
    "linear",  # matmul with a weight
    "attention",  # softmax(q·kᵀ)·v, including rotary and position bias
    "mixing",  # of tokens otherwise than by that: long convolutions, attention in buckets or clusters
    "norm",
    "activation",  # of a feed-forward network; if gated, multiplied by `up`
    "add",  # residual connection
    "concat",
    "gather",  # rows picked for the experts of a mixture
    "combine",  # weighted sum of the experts' outputs
    "recurrent",  # all time steps of a recurrent layer
    "lm_head",  # matmul with the lm_head weight
]


@dataclass(frozen=True)
class GraphTensor:
    """A tensor in the graph: the output of an operation, or an input of the graph."""

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
    """One operation. It has one output, which other operations refer to by this operation's name.

    Operations with parameters are named after the module that owns these ("decoder.blocks.3.mixer.qkv.q"). Views, casts
    and small element-wise ops (rotary, a pooler's tanh) are counted in their consumer.
    """

    name: str  # unique in its graph
    kind: Kind
    # names of the operations or graph inputs that it reads; of attention: q, k, v, then the bias, if any
    inputs: tuple[str, ...]
    shape: tuple[int, ...]  # of its output
    dtype: str  # of its output
    role: str = ""  # of its weight, one of `luban.nn.roles.ROLES`; "": no weight
    layer: str = ""  # its Transformer layer, such as "decoder.blocks.3"; "": not in a layer
    fusion_group: str = ""  # module that can compute it in one matmul with others of the same input; "": none
    flops: int = 0  # of one forward, a multiply-add counted as two
    parameters: int = 0  # number of its parameters; 0 if shared with an earlier op
    active_share: float = 1.0  # of its parameters, the share that a token uses: of experts, those that it reads
    saved_elements: int = 0  # elements saved for the backward pass
    in_features: int = 0  # of linear and lm_head
    out_features: int = 0  # of linear and lm_head
    mask_density: float = 1.0  # of attention: fraction of queries × keys that the mask leaves
    heads: int = 0  # of attention: query heads
    key_heads: int = 0  # of attention: heads of keys and values
    head_dim: int = 0  # of attention

    @property
    def output(self) -> GraphTensor:
        """Its output."""
        return GraphTensor(self.name, self.shape, self.dtype)

    @property
    def output_bytes(self) -> int:
        """Bytes of its output."""
        return ITEMSIZE[self.dtype] * prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class OpGraph:
    """A model's operations for one batch, in an order in which they can run.

    Raises:
        ValueError: two operations or inputs share a name, or an operation reads a tensor that isn't computed before it.
    """

    ops: tuple[Op, ...]
    inputs: tuple[GraphTensor, ...]  # of the whole graph
    batch: int  # sequences
    seq: int  # tokens per sequence
    dtype: str  # of the matmuls

    def __post_init__(self):
        known = {value.name for value in self.inputs}
        for op in self.ops:
            if missing := [name for name in op.inputs if name not in known]:
                raise ValueError(f"operation {op.name} reads {', '.join(missing)}, which isn't computed before it")
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
    def model_flops(self) -> float:
        """Training FLOPs that the model needs, the numerator of MFU: 3 × forward, of attention only the unmasked part.

        For a causal decoder this is tokens × (6·(matrices without the input embedding) + 6·layers·heads·head dim·T).
        Norm weights (a few parts in 10⁵ of the usual 6·parameters) and recomputation in the backward pass don't count;
        document boundaries in a pack are not subtracted.
        """
        return TRAINING_FACTOR * sum(op.flops * op.mask_density for op in self.ops)

    @property
    def parameters(self) -> int:
        """Number of parameters; shared weights are counted once."""
        return sum(op.parameters for op in self.ops)

    @property
    def active_parameters(self) -> int:
        """Number of parameters that a token uses: of the experts of a mixture, those that it reads."""
        return round(sum(op.parameters * op.active_share for op in self.ops))

    @property
    def saved_bytes(self) -> int:
        """Bytes that a forward with fused attention saves for the backward pass when nothing is recomputed."""
        return self.itemsize * sum(op.saved_elements for op in self.ops)

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
        """The tensor of this name: an input of the graph or the output of an operation."""
        return self._values[name]

    def consumers(self, name: str) -> tuple[Op, ...]:
        """The operations that read the tensor of this name, in order."""
        return self._consumers[name]

    def layers(self) -> dict[str, OpGraph]:
        """Name of each Transformer layer → its operations as a graph, in order."""
        cut: dict[str, list[Op]] = {}
        for op in self.ops:
            if op.layer:
                cut.setdefault(op.layer, []).append(op)
        return {layer: self.subgraph(ops) for layer, ops in cut.items()}

    def subgraph(self, ops: Iterable[Op]) -> OpGraph:
        """These operations, in the graph's order, as a graph whose inputs are the tensors they read from outside."""
        ops = tuple(ops)
        made = {op.name for op in ops}
        read = dict.fromkeys(name for op in ops for name in op.inputs if name not in made)
        inputs = tuple(self.value(name) for name in read)
        return OpGraph(ops=ops, inputs=inputs, batch=self.batch, seq=self.seq, dtype=self.dtype)


def mask_density(seq: int, window: int | None, *, causal: bool) -> float:
    """Fraction of queries × keys that a mask leaves; diagonal entries count ½, so a causal mask leaves ½ at any length.

    Args:
        window: window size in tokens, itself included (both directions if not causal); None: no window.
    """
    band = min(seq if window is None else window, seq) / seq
    return (1 if causal else 2) * band * (1 - band / 2)
