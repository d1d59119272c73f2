"""What a model does, as data: operations with their FLOPs, parameters and activation sizes. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

TRAINING_FACTOR = 3  # one forward, and a backward with two matmuls for each of its matmuls


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation of one layer."""

    name: str  # where it is, such as "blocks.3.attention.q"
    kind: str  # embedding, linear, attention, norm, activation, memory, lm_head
    flops: int = 0  # of one forward, a multiply-add counted as two
    parameters: int = 0  # scalars it owns
    activation: int = 0  # elements it leaves for the backward pass
    sides: tuple[int, int] = (0, 0)  # of a linear layer: (inputs, outputs)
    density: float = 1.0  # of an attention: share of its queries × keys that the mask leaves
    heads: int = 0  # of an attention: query heads
    key_heads: int = 0  # of an attention: heads of keys and values
    head_dim: int = 0  # of an attention: width of a head

    def within(self, prefix: str) -> Op:
        """The same operation inside the module `prefix`."""
        return replace(self, name=f"{prefix}.{self.name}")


@dataclass(frozen=True, kw_only=True)
class OpGraph:
    """A model's operations in the order in which they run, for one batch."""

    ops: tuple[Op, ...]
    batch: int  # sequences
    seq: int  # tokens a sequence

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

        For a causal decoder this is tokens × (6·(matrices without the input embedding) + 6·layers·heads·head width·T):
        what utilisation refers to. Norms' scales, a few parts in 10⁵ of the usual 6·parameters, and what is computed
        again in the backward pass don't count; borders of documents in a pack don't take anything off.
        """
        return TRAINING_FACTOR * sum(op.flops * op.density for op in self.ops)

    @property
    def parameters(self) -> int:
        """Scalars in the model; shared weights counted once."""
        return sum(op.parameters for op in self.ops)

    def activation_bytes(self, bytes_per_element: int = 2) -> int:
        """Bytes that a forward keeps for the backward pass when nothing is recomputed."""
        return bytes_per_element * sum(op.activation for op in self.ops)

    def layers(self) -> dict[str, OpGraph]:
        """The graph cut by layer: `decoder.embedding`, `decoder.blocks.0`, …, `decoder.norm`, `head`."""
        cut: dict[str, list[Op]] = {}
        for op in self.ops:
            cut.setdefault(_layer(op.name), []).append(op)
        return {name: OpGraph(ops=tuple(ops), batch=self.batch, seq=self.seq) for name, ops in cut.items()}


def _layer(name: str) -> str:
    """Up to the number of the layer; outside of layers the part of a stack, or the name's first part."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is not None:
        return ".".join(parts[: number + 1])
    return ".".join(parts[: 2 if parts[0] in ("encoder", "decoder") else 1])


def within(prefix: str, ops: Iterable[Op]) -> list[Op]:
    """The operations as part of the module `prefix`."""
    return [op.within(prefix) for op in ops]


def mask_density(seq: int, window: int | None, *, causal: bool) -> float:
    """Share of the queries × keys that a mask leaves, the diagonal halved: a causal mask leaves ½, whatever the length.

    Args:
        window: slots that a token sees before it, itself included (and after it, where not causal); none: all.
    """
    band = min(seq if window is None else window, seq) / seq
    return (1 if causal else 2) * band * (1 - band / 2)


def linear_op(name: str, tokens: int, inputs: int, outputs: int, *, bias: bool = False, keeps: bool = True) -> Op:
    """A linear layer over `tokens` rows: 2·tokens·inputs·outputs FLOPs, its output kept for the backward pass."""
    return Op(
        name=name,
        kind="linear",
        flops=2 * tokens * inputs * outputs,
        parameters=inputs * outputs + (outputs if bias else 0),
        activation=tokens * outputs if keeps else 0,
        sides=(inputs, outputs),
    )
