"""Modules that own matmul weights: a weight is read in its owner's `forward` and nowhere else.

An owner is as large as fusion needs: `QKVLinear` owns three weights of one input and multiplies them as one where that
is faster, `luban.nn.feedforward.gated.GatedFeedForward` owns gate, up and down. So hooks (FSDP, tensor parallel),
adapters and 8-bit matmuls work on every path. I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.kernels.available import triton_runs
from luban.nn.int8 import Int8Weight
from luban.nn.roles import Role
from luban.nn.row import linear


class Matmul:
    """How owners multiply: here with torch. A precision gives another one to `MatmulOwner.use_matmul`."""

    def serves(self, outputs: int, inputs: int) -> bool:
        """Whether a weight of these sides can be multiplied this way."""
        return True

    def linear(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x·weightᵀ (+ bias), (…, I) → (…, O)."""
        return linear(x, weight_OI, bias_O)

    def serves_swiglu(self, width: int, inner: int) -> bool:
        """Whether `swiglu` can serve a feed-forward network of these widths."""
        return False

    def swiglu(self, x_NE: Tensor, gate_up_WE: Tensor, down_OI: Tensor) -> Tensor:
        """(silu(gate)·up)·downᵀ, (N, O); the first I of the W = 2I rows of `gate_up_WE` are gates."""
        raise NotImplementedError


TORCH = Matmul()


class Projection(nn.Module):
    """Weight (O, I) and bias (O,) of one linear map, read by the owner that holds it. It has no forward of its own.

    Args:
        role: of the weight.
        writes_residual: the output is added to the residual stream; initialisations may scale it by depth.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, role: Role, writes_residual: bool = False):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.writes_residual, self.init_gain = writes_residual, 1.0
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.parameter_roles: dict[str, Role] = {"weight": role, "bias": "bias"}

    def drop_parameters(self) -> None:
        """Free weight and bias, which are None from then on."""
        self.register_parameter("weight", None)
        self.bias = None


class MatmulOwner:
    """Mixin of the modules that own matmul weights, their `projections`.

    An additive term (an adapter's low-rank product, say) of a projection is computed inside the owner's forward, so
    that fused kernels keep running beside it.
    """

    def init_matmul(self) -> None:
        """Set the attributes below; an owner calls it after `nn.Module.__init__`."""
        self.matmul: Matmul = TORCH
        self.terms: nn.ModuleDict | None = None  # projection → module from its input to what is added to its output
        self.int8: nn.ModuleDict | None = None  # weights packed for inference on a CPU; they replace the projections

    def projections(self) -> Mapping[str, Projection]:
        """The linear maps that this module owns, by name."""
        raise NotImplementedError

    def add_term(self, projection: str, term: nn.Module) -> None:
        """Add `term(x)`, (…, I) → (…, O), to what this projection makes of x. Raises ConfigError for an unknown one."""
        if projection not in self.projections():
            known = ", ".join(self.projections())
            raise ConfigError(f"{type(self).__name__} has no projection '{projection}'; it has {known}")
        if self.terms is None:
            self.terms = nn.ModuleDict()
        self.terms[projection] = term

    def term(self, projection: str, x: Tensor) -> Tensor | None:
        """What is added to this projection's output for its input x; None: nothing."""
        if self.terms is None or projection not in self.terms:
            return None
        return self.terms[projection](x)

    def plus_term(self, projection: str, y: Tensor, x: Tensor) -> Tensor:
        """This projection's output y for its input x, with what is added to it."""
        term = self.term(projection, x)
        return y if term is None else y + term

    def add_terms_(self, y: Tensor, x: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """Add to outputs that lie side by side in y, (…, sum of O), in place.

        Args:
            sizes: projection → O, in the order in which they lie.
        """
        start = 0
        for name, size in sizes.items():
            if (term := self.term(name, x)) is not None:
                y.narrow(-1, start, size).add_(term)
            start += size
        return y

    def use_matmul(self, matmul: Matmul) -> list[str]:
        """Multiply with `matmul` from now on if it serves every projection; returns the projections it doesn't."""
        refused = [name for name, p in self.projections().items() if not matmul.serves(p.out_features, p.in_features)]
        if not refused:
            self.matmul = matmul
        return refused

    def pack_int8(self) -> None:
        """Replace the weights by 8-bit ones for inference, in place; those of one input as one."""
        raise NotImplementedError


class Linear(Projection, MatmulOwner):
    """x·weightᵀ (+ bias), the owner of one weight (O, I)."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, role: Role = "dense", writes_residual: bool = False
    ):
        super().__init__(inputs, outputs, bias=bias, role=role, writes_residual=writes_residual)
        self.init_matmul()

    def projections(self) -> Mapping[str, Projection]:
        """Itself, as "weight"."""
        return {"weight": self}

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        y = self.matmul.linear(x, self.weight, self.bias) if self.int8 is None else self.int8["weight"](x)
        return self.plus_term("weight", y, x)

    def pack_int8(self) -> None:
        """In place."""
        self.int8 = nn.ModuleDict({"weight": Int8Weight(self.weight, self.bias)})
        self.drop_parameters()


class JointLinear(nn.Module, MatmulOwner):
    """Several linear maps of one input. Each keeps a weight of its own; in training on a GPU they are multiplied as one:
    the input is read once, and its gradient is one matmul instead of several and their sum.

    Args:
        outputs: name → O of each map, in order; the names are roles too.
    """

    def __init__(self, inputs: int, outputs: Mapping[str, int], *, bias: bool):
        super().__init__()
        self.init_matmul()
        self.sizes = dict(outputs)
        for name, size in outputs.items():
            self.add_module(name, Projection(inputs, size, bias=bias, role=name))  # type: ignore[arg-type]

    def projections(self) -> Mapping[str, Projection]:
        """The maps by name."""
        return {name: self.get_submodule(name) for name in self.sizes}  # type: ignore[misc]

    def forward(self, x: Tensor, *, joint: bool = False) -> Tensor | tuple[Tensor, ...]:
        """(…, I) → one (…, O) a map; with `joint` side by side in one tensor, (…, sum of O)."""
        if not (joint or self.int8 is not None or trains_fused(x)):
            parts = [self.matmul.linear(x, p.weight, p.bias) for p in self._projections()]
            return tuple(self.plus_term(name, y, x) for name, y in zip(self.sizes, parts, strict=True))
        if self.int8 is not None:
            y = self.int8["joint"](x)
        else:
            y = self.matmul.linear(x, *joined(*self._projections()))
        sizes = self._sizes_here()
        y = y if self.terms is None else self.add_terms_(y, x, sizes)
        return y if joint else y.split(list(sizes.values()), dim=-1)

    def _sizes_here(self) -> dict[str, int]:
        """O of each map in this process, which may hold a part of the rows only."""
        if self.int8 is not None:
            return self.sizes
        return {name: p.weight.shape[0] for name, p in zip(self.sizes, self._projections(), strict=True)}

    def _projections(self) -> Iterator[Projection]:
        return (self._modules[name] for name in self.sizes)  # type: ignore[return-value]

    def pack_int8(self) -> None:
        """All as one, in place."""
        self.int8 = nn.ModuleDict({"joint": Int8Weight(*joined(*self._projections()))})
        for projection in self._projections():
            projection.drop_parameters()


class QKVLinear(JointLinear):
    """Queries, keys and values of one input: weights q (H·D, E), k and v (K·D, E)."""

    q: Projection
    k: Projection
    v: Projection

    def __init__(self, width: int, *, queries: int, keys: int, bias: bool):
        super().__init__(width, {"q": queries, "k": keys, "v": keys}, bias=bias)


def joined(*projections: Projection) -> tuple[Tensor, Tensor | None]:
    """Weights and biases one below the other, for one matmul."""
    biases: list[Tensor] = [p.bias for p in projections if p.bias is not None]  # all have one, or none
    return torch.cat([p.weight for p in projections]), torch.cat(biases) if biases else None


def trains_fused(x: Tensor) -> bool:
    """Whether this is training where Triton's kernels run."""
    return torch.is_grad_enabled() and triton_runs(x)


def matmul_owners(module: nn.Module) -> Iterator[tuple[str, MatmulOwner]]:
    """Every owner of matmul weights inside `module`, with its qualified name."""
    return ((name, part) for name, part in module.named_modules() if isinstance(part, MatmulOwner))


@torch.no_grad()
def store_column_major(module: nn.Module) -> None:
    """Store the float32 matrices of `module` on the CPU column by column (names, shapes and values stay).

    The product of one row with such a matrix reads it at the memory's full speed, as decoding one token needs
    (`luban.nn.row`). Embedding tables follow, as a tied output layer is a matmul. Every matrix keeps a block of memory of
    its own: side by side in one they would have gaps, over which torch's fused optimizers write.
    """
    for part in module.modules():
        if not isinstance(part, (Projection, nn.Embedding)) or part.weight is None:
            continue
        weight = part.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.t().is_contiguous():
            weight.data = weight.t().contiguous().t()
