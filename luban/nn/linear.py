"""Modules that own matmul weights: a weight is read in its owner's `forward` and nowhere else.

An owner is as large as fusion needs: `QKVLinear` owns three weights of one input and multiplies them as one where that
is faster, `luban.nn.feedforward.gated.GatedFeedForward` owns gate, up and down. So hooks (FSDP, tensor parallel),
adapters and 8-bit matmuls work on every path. I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.kernels.available import infers_fused, triton_runs
from luban.nn.int8 import Int8Weight, PackedKind
from luban.nn.low_rank import adapted_linear, products
from luban.nn.roles import Role
from luban.nn.row import linear


class Matmul:
    """Matmul implementation used by weight owners; this one is F.linear. fp8 installs its own with
    `MatmulOwner.use_matmul`."""

    def supports(self, outputs: int, inputs: int) -> bool:
        """True if a weight of shape (outputs, inputs) can be multiplied this way."""
        return True

    def linear(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x·weightᵀ (+ bias), (…, I) → (…, O)."""
        return linear(x, weight_OI, bias_O)

    def supports_swiglu(self, width: int, inner: int) -> bool:
        """True if `swiglu` supports a feed-forward network of these widths."""
        return False

    def swiglu(self, x_NE: Tensor, gate_up_WE: Tensor, down_OI: Tensor) -> Tensor:
        """(silu(gate)·up)·downᵀ, (N, O); the first I of the W = 2I rows of `gate_up_WE` are gates."""
        raise NotImplementedError


TORCH = Matmul()


class Projection(nn.Module):
    """Weight (O, I) and bias (O,) of one linear map. It has no forward of its own, so that only the owner's forward (and
    its hooks) reads it.

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
        """Free weight and bias: both are None afterwards."""
        self.register_parameter("weight", None)
        self.bias = None


class Stack(Protocol):
    """Low-rank adapters of several requests at projections of one input (`luban.adapters.stack`)."""

    def add(self, y: Tensor, x: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """Add to outputs y (…, ΣO) of the projections `sizes` what the rows' adapters make of inputs x (…, I), in place."""
        ...

    def clear(self, slot: int) -> None:
        """Take an adapter out."""
        ...


class MatmulOwner:
    """Mixin of the modules that own matmul weights, their `projections`.

    The output of a projection's adapter (LoRA's low-rank product, for example) is computed inside the owner's forward,
    so that fused kernels are still used.
    """

    def init_matmul(self) -> None:
        """Set the attributes below; an owner calls it after `nn.Module.__init__`."""
        self.matmul: Matmul = TORCH
        # projection name → adapter module; its output is added to the projection's
        self.adapters: nn.ModuleDict | None = None
        self.stacks: dict[str, Stack] = {}  # projection → adapters in serving, each for its own rows
        # weights in 8 or 4 bits, which stand for those of the projections
        self.packed: nn.ModuleDict | None = None

    def projections(self) -> Mapping[str, Projection]:
        """Name → linear map, of those that this module owns."""
        raise NotImplementedError

    def joint_projections(self) -> tuple[Projection, ...]:
        """Those that are multiplied with the same input, in the order of concatenation; none: there are not several."""
        return ()

    def add_adapter(self, projection: str, adapter: nn.Module) -> None:
        """Add `adapter(x)`, (…, I) → (…, O), to this projection's output; an adapter with `reads_output` makes the output
        itself, `adapter(x, y, projection)`, of the input, the unchanged output y and the `Projection`.

        Raises ConfigError for an unknown projection.
        """
        if projection not in self.projections():
            known = ", ".join(self.projections())
            raise ConfigError(f"{type(self).__name__} has no projection '{projection}'; it has {known}")
        if self.adapters is None:
            self.adapters = nn.ModuleDict()
        self.adapters[projection] = adapter

    @property
    def adapted(self) -> bool:
        """Whether there is any adapter."""
        return self.adapters is not None or bool(self.stacks)

    def plus_adapter(self, projection: str, y: Tensor, x: Tensor) -> Tensor:
        """The output as its adapters change it, if there are any; y (…, O), x (…, I)."""
        return self.add_adapters(y, x, {projection: y.shape[-1]})

    def multiply(self, x: Tensor, sizes: Mapping[str, int], weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """(…, I) → (…, ΣO), as the adapters change it.

        Args:
            sizes: projection → O, in the order of concatenation in the weight.
        """
        frozen = not (weight_OI.requires_grad or (bias_O is not None and bias_O.requires_grad))
        if self.adapters is not None and self.matmul is TORCH and torch.is_grad_enabled() and frozen:
            added = products(self.adapters, sizes)
            if added and x.dtype == weight_OI.dtype == added[0][1][0].dtype:
                return adapted_linear(x, weight_OI, bias_O, added)
        y = self.matmul.linear(x, weight_OI, bias_O)
        return self.add_adapters(y, x, sizes)

    def add_adapters(self, y: Tensor, x: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """The concatenated outputs y (…, ΣO) as the adapters change their slices; x (…, I). y itself stays as it is, but for
        stacks, which know no gradients: what a matmul gave may be kept for the backward pass.

        Args:
            sizes: projection → O, in the order of concatenation.
        """
        if self.stacks and (stack := self.stacks.get(next(iter(sizes)))) is not None:
            y = stack.add(y, x, sizes)
        if self.adapters is None or not any(name in self.adapters for name in sizes):
            return y
        held, projections = self.adapters, self.projections()
        changed = [
            adapted_output(held[name], x, part, projections[name]) if name in held else part
            for name, part in zip(sizes, y.split(list(sizes.values()), dim=-1), strict=True)
        ]
        return changed[0] if len(changed) == 1 else torch.cat(changed, dim=-1)

    def use_matmul(self, matmul: Matmul) -> list[str]:
        """Use `matmul` if it supports every projection's shape; return the projections it doesn't support (then nothing
        changes)."""
        unsupported = [
            name for name, p in self.projections().items() if not matmul.supports(p.out_features, p.in_features)
        ]
        if not unsupported:
            self.matmul = matmul
        return unsupported

    def pack(self, kind: PackedKind = Int8Weight) -> None:
        """Replace the weights by packed ones of this kind; weights that read the same input are concatenated."""
        raise NotImplementedError


def reads_output(adapter: nn.Module) -> bool:
    """Whether an adapter is called as `adapter(x, y, projection)` and returns the new output."""
    return getattr(adapter, "reads_output", False)


def adapted_output(adapter: nn.Module, x: Tensor, y: Tensor, projection: Projection) -> Tensor:
    """The output (…, O) of a projection as its adapter changes it; x (…, I), y (…, O) without the adapter."""
    return adapter(x, y, projection) if reads_output(adapter) else y + adapter(x)


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
        if self.packed is not None:
            return self.plus_adapter("weight", self.packed["weight"](x), x)
        return self.multiply(x, {"weight": self.weight.shape[0]}, self.weight, self.bias)

    def pack(self, kind: PackedKind = Int8Weight) -> None:
        """Replace the weight by a packed one."""
        self.packed = nn.ModuleDict({"weight": kind(self.weight, self.bias)})
        self.drop_parameters()


class JointLinear(nn.Module, MatmulOwner):
    """Several linear maps of one input. Each has its own weight; training on a GPU concatenates the weights for one
    matmul, so that the input is read once and its gradient is one matmul instead of a sum of several. Inference on a GPU
    does so where they lie one after another in memory (`lay_adjacent`).

    Args:
        outputs: name → O of each map, in order; the names are also the weights' roles.
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

    def joint_projections(self) -> tuple[Projection, ...]:
        """All."""
        return tuple(self._projections())

    def forward(self, x: Tensor, *, joint: bool = False) -> Tensor | tuple[Tensor, ...]:
        """(…, I) → a tuple of (…, O); with joint=True one concatenated (…, ΣO)."""
        if not (joint or self.joins(x)):
            each = zip(self.sizes, self._projections(), strict=True)
            return tuple(self.multiply(x, {name: p.weight.shape[0]}, p.weight, p.bias) for name, p in each)
        sizes = self.local_sizes()
        if self.packed is None:
            y = self.multiply(x, sizes, *joined(*self._projections()))
        else:
            y = self.add_adapters(self.packed["joint"](x), x, sizes)
        return y if joint else y.split(list(sizes.values()), dim=-1)

    def joins(self, x: Tensor) -> bool:
        """Whether x is multiplied with the concatenated weights."""
        return self.packed is not None or multiplies_joined(x, *self._projections())

    def local_sizes(self) -> dict[str, int]:
        """O of each map in this process; with tensor parallelism a shard of the rows."""
        if self.packed is not None:
            return self.sizes
        return {name: p.weight.shape[0] for name, p in zip(self.sizes, self._projections(), strict=True)}

    def _projections(self) -> Iterator[Projection]:
        return (self._modules[name] for name in self.sizes)  # type: ignore[return-value]

    def pack(self, kind: PackedKind = Int8Weight) -> None:
        """Replace the weights by one packed weight."""
        self.packed = nn.ModuleDict({"joint": kind(*joined(*self._projections()))})
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
    """Weights and biases concatenated along the output dimension: (ΣO, I) and (ΣO,). Weights that lie one after another are
    not copied where no gradient is asked for."""
    biases: list[Tensor] = [p.bias for p in projections if p.bias is not None]  # all have one, or none
    bias_O = torch.cat(biases) if biases else None
    weights = [p.weight for p in projections]
    if not torch.is_grad_enabled() and adjacent(*projections):
        rows = sum(weight.shape[0] for weight in weights)
        return weights[0].detach().as_strided((rows, weights[0].shape[1]), weights[0].stride()), bias_O
    return torch.cat([*weights]), bias_O


def adjacent(*projections: Projection) -> bool:
    """Whether the weights lie one after another in one piece of memory."""
    if torch.compiler.is_compiling():
        return False
    weights = [p.weight for p in projections]
    if any(type(w) is not nn.Parameter or not w.is_contiguous() or w.dtype != weights[0].dtype for w in weights):
        return False
    place = weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != place or weight.untyped_storage().data_ptr() != weights[0].untyped_storage().data_ptr():
            return False
        place += weight.nbytes
    return True


@torch.no_grad()
def lay_adjacent(module: nn.Module) -> None:
    """Put weights that are multiplied with the same input one after another in memory, for inference with one matmul in place
    of several. Names, shapes and values don't change, and each remains a parameter of its own."""
    for _, owner in matmul_owners(module):
        joint = owner.joint_projections()
        if len(joint) < 2 or owner.packed is not None or adjacent(*joint):
            continue
        weights = [p.weight for p in joint]
        if any(type(w) is not nn.Parameter or w.dtype != weights[0].dtype for w in weights):
            continue
        whole = torch.cat([weight.data for weight in weights])
        for weight, part in zip(weights, whole.split([weight.shape[0] for weight in weights]), strict=True):
            weight.data = part


def multiplies_joined(x: Tensor, *projections: Projection) -> bool:
    """Whether x is multiplied with the concatenated weights: on a GPU, in training or where that needs no copy."""
    if any(p.weight is not None and p.weight.device.type != x.device.type for p in projections):
        return False  # weights that wait on the host are read one by one
    return trains_fused(x) or (infers_fused(x) and adjacent(*projections))


def trains_fused(x: Tensor) -> bool:
    """True if gradients are enabled and Triton kernels, which compute in float32, serve x."""
    return torch.is_grad_enabled() and x.dtype != torch.float64 and triton_runs(x)


def matmul_owners(module: nn.Module) -> Iterator[tuple[str, MatmulOwner]]:
    """Every owner of matmul weights inside `module`, with its qualified name."""
    return ((name, part) for name, part in module.named_modules() if isinstance(part, MatmulOwner))


@torch.no_grad()
def store_column_major(module: nn.Module) -> None:
    """Store float32 CPU matrices column-major: a matrix–vector product (decoding) then runs at memory bandwidth.

    Names, shapes and values don't change (`luban.nn.row` has the product). Embedding weights are included, since a tied
    output layer multiplies with them. Each matrix keeps its own storage, because torch's fused optimizers overwrite the
    gaps between slices of one buffer.
    """
    for part in module.modules():
        if not isinstance(part, (Projection, nn.Embedding)) or part.weight is None:
            continue
        weight = part.weight
        if (
            weight.dim() == 2
            and weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and not weight.t().is_contiguous()
        ):
            weight.data = weight.t().contiguous().t()
