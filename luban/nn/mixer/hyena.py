"""Hyena: gated long convolutions in the place of attention (Poli et al. 2023).

B batch, T new tokens, S tokens with those in the cache, E model width, N order, K short taps, L length of a filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.kernels.convolution import convolution_flops, long_convolution, short_convolution
from luban.nn.context import LayerContext
from luban.nn.init import InitialValues
from luban.nn.linear import Linear
from luban.nn.mixer.base import LayerShape, Mixer, TokenState
from luban.nn.roles import Role

SLOW, FAST, FLOOR = (
    1.5,
    0.3,
    0.01,
)  # the slowest and fastest channel decay to FLOOR after these fractions of the context


@dataclass(frozen=True, kw_only=True)
class Hyena(Mixer):
    """z₁ = v, zₙ₊₁ = xₙ · (hₙ ∗ zₙ), with v and the gates x from the input by a linear map and a short convolution (definition
    3.1). The filters h are a network's values at each position, times an exponential decay (section 3.3)."""

    undivided: ClassVar[frozenset[str]] = frozenset({"tensor", "context"})
    order: int = 2  # N, long convolutions one after another
    short: int = 3  # K, taps of the short convolution
    bands: int = 16  # sines and cosines of the position that the filters' network reads, of each so many
    filter_width: int = 64  # of that network
    filter_layers: int = 2  # hidden layers of that network
    frequency: float = 10.0  # of its sines at first
    shift: float = 0.05  # added to the decay, so that tokens at any distance count

    def __post_init__(self):
        for name in ("order", "short", "bands", "filter_width", "filter_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"hyena's {name} must be at least 1, {getattr(self, name)} given")
        if not 0 < self.frequency < math.inf or not 0 <= self.shift < math.inf:
            raise ConfigError(f"hyena needs a frequency above 0 and a shift from 0 on: {self.frequency}, {self.shift}")

    @property
    def features(self) -> int:
        """Numbers that the filters' network reads of a position."""
        return 2 * self.bands + 1

    def widths(self, width: int) -> list[tuple[int, int]]:
        """(inputs, outputs) of the layers of the filters' network."""
        hidden = [self.filter_width] * self.filter_layers
        return list(zip([self.features, *hidden], [*hidden, self.order * width], strict=True))

    def state_spec(self, width: int) -> tuple[TokenState, ...]:
        """What the short convolution reads of the last tokens, and what each long one reads of all."""
        return TokenState((self.order + 1) * width, last=self.short - 1), TokenState(self.order * width)

    def build(self, shape: LayerShape) -> nn.Module:
        """The module."""
        return HyenaMixer(self, shape)

    def describe(
        self, graph: GraphBuilder, x_BTE: GraphTensor, shape: LayerShape, bias: GraphTensor | None
    ) -> GraphTensor:
        """Record linear map, short convolution, filters, long convolutions with gates, output."""
        (batch, seq, width), order = x_BTE.shape, self.order
        wide = "float64" if graph.dtype == "float64" else "float32"
        u = graph.linear("inputs", x_BTE, (order + 1) * width, bias=True)
        channels = u.shape[-1]
        u = graph.add(
            "short",
            "mixing",
            u,
            shape=u.shape,
            role="dense",
            parameters=channels * (self.short + 1),
            saved_elements=u.elements,
        )
        sizes = self.widths(width)
        filters = graph.add(
            "filters",
            "mixing",
            shape=(order, width, seq),
            dtype=wide,
            role="dense",
            flops=sum(2 * seq * inputs * outputs for inputs, outputs in sizes),
            parameters=sum((inputs + 1) * outputs for inputs, outputs in sizes) + self.filter_width,
            saved_elements=seq * (self.features + (1 + order) * width + 3 * self.filter_layers * self.filter_width),
        )
        y_BTE = graph.add(
            "recurrence",
            "mixing",
            u,
            filters,
            shape=x_BTE.shape,
            role="bias",
            flops=order * convolution_flops(batch, width, seq),
            parameters=order * width,
            saved_elements=2 * order * x_BTE.elements,
        )
        return graph.linear("output", y_BTE, width, role="o", bias=True)


class HyenaMixer(nn.Module):
    """One layer's Hyena."""

    def __init__(self, config: Hyena, shape: LayerShape):
        super().__init__()
        self.width = shape.width
        self.inputs = Linear(shape.width, (config.order + 1) * shape.width)
        self.short = ShortConvolution((config.order + 1) * shape.width, config.short)
        self.filters = ImplicitFilters(config, shape)
        self.recurrence = GatedConvolutions(config.order, shape.width)
        self.output = Linear(shape.width, shape.width, role="o", writes_residual=True)

    def forward(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E). Raises DataError for a row longer than the filters, and for a prefix that earlier tokens see."""
        if ctx.rows.prefix:
            raise DataError("hyena reads from left to right only, so no token can see a later one: drop `segments`")
        u_BTC = self.short(ctx.rows.without_padding(self.inputs(x_BTE)), ctx)
        if ctx.cache is None:
            return self.output(self.recurrence(u_BTC, self.filters(x_BTE.shape[1]), ctx))
        return self.output(self.recurrence(u_BTC, self._kept_filters(ctx), ctx))

    def _kept_filters(self, ctx: LayerContext) -> Tensor:
        """(N, E, L) for at least as many tokens as the cache holds, computed anew whenever those have doubled."""
        tokens, kept = ctx.cache.cache.length, ctx.cache.constants
        if "filters" not in kept or kept["filters"].shape[-1] < tokens:
            kept["filters"] = self.filters(min(self.filters.context, 1 << (tokens - 1).bit_length()))
        return kept["filters"]


class ShortConvolution(nn.Module):
    """A convolution over the last K tokens, channel by channel, with a bias."""

    parameter_roles: ClassVar[dict[str, Role]] = {"weight": "dense", "bias": "bias"}

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels))

    def draw_parameters(self, draw: InitialValues) -> None:
        """Standard deviation 1/√(3K), as torch's convolutions have; bias 0."""
        self.weight.copy_(draw.normal("weight", self.weight, (3 * self.weight.shape[1]) ** -0.5))
        self.bias.zero_()

    def forward(self, u_BTC: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        if ctx.cache is None:
            return short_convolution(u_BTC, self.weight, ctx.rows.documents_BT) + self.bias
        whole_BCS = ctx.cache.extend(0, u_BTC.mT)
        return short_convolution(whole_BCS.mT, self.weight)[:, -u_BTC.shape[1] :] + self.bias


class GatedConvolutions(nn.Module):
    """The long convolutions and the gates behind them. `skip` (N, E) adds the token itself (the filters' term at distance 0)."""

    parameter_roles: ClassVar[dict[str, Role]] = {"skip": "bias"}

    def __init__(self, order: int, width: int):
        super().__init__()
        self.skip = nn.Parameter(torch.empty(order, width))

    def draw_parameters(self, draw: InitialValues) -> None:
        """Standard deviation 1."""
        self.skip.copy_(draw.normal("skip", self.skip, 1.0))

    def forward(self, u_BTC: Tensor, filters_NEL: Tensor, ctx: LayerContext) -> Tensor:
        """Gates and values (B, T, (N+1)·E) → (B, T, E)."""
        order = self.skip.shape[0]
        *gates_BTE, z_BTE = u_BTC.chunk(order + 1, dim=-1)
        z_BTE = ctx.rows.without_padding(z_BTE)
        before = [] if ctx.cache is None else self._earlier(z_BTE, ctx)
        kept = []
        for n, gate_BTE in enumerate(gates_BTE):
            if ctx.cache is None:
                y_BET = long_convolution(z_BTE.mT, filters_NEL[n], ctx.rows.documents_BT)
            else:
                kept.append(z_BTE.mT)
                y_BET = _continued(torch.cat((before[n], z_BTE.mT), -1), filters_NEL[n], z_BTE.shape[1])
            z_BTE = gate_BTE * (y_BET.mT + self.skip[n] * z_BTE)
        if ctx.cache is not None:
            ctx.cache.extend(1, torch.cat(kept, 1))
        return z_BTE

    def _earlier(self, z_BTE: Tensor, ctx: LayerContext) -> list[Tensor]:
        """What each convolution read of the tokens in the cache, (B, E, S − T) each."""
        states_BCS, new = ctx.cache.states[1], z_BTE.shape[1]
        return list(states_BCS[:, :, : ctx.cache.cache.length - new].chunk(self.skip.shape[0], dim=1))


def _continued(z_BES: Tensor, filters_EL: Tensor, new: int) -> Tensor:
    """The convolution's values at the last `new` tokens, (B, E, new): by FFT, or one token's as a sum of products."""
    if new > 1:
        return long_convolution(z_BES, filters_EL)[..., -new:]
    taps_ES = filters_EL[:, : z_BES.shape[-1]].flip(-1)
    return (z_BES * taps_ES).sum(-1, keepdim=True).to(z_BES.dtype)


class ImplicitFilters(nn.Module):
    """The filters' network (equation 7): sines and cosines of the position, hidden layers with sin(ω·x), then a linear one;
    times exp(−αt) + shift, with another α for every channel. In float32 or wider, whatever the model's precision."""

    def __init__(self, config: Hyena, shape: LayerShape):
        super().__init__()
        self.config, self.width, self.context = config, shape.width, shape.context
        self.parameter_roles: dict[str, Role] = {"frequency": "position"}
        self.frequency = nn.Parameter(torch.empty(config.filter_width))  # ω
        for i, (inputs, outputs) in enumerate(config.widths(shape.width)):
            self.register_parameter(f"weight_{i}", nn.Parameter(torch.empty(outputs, inputs)))
            self.register_parameter(f"bias_{i}", nn.Parameter(torch.empty(outputs)))
            self.parameter_roles |= {f"weight_{i}": "dense", f"bias_{i}": "bias"}

    def draw_parameters(self, draw: InitialValues) -> None:
        """Matrices with standard deviation 1/√(3·inputs), as torch's linear layers have; biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(draw.normal(name, parameter, (3 * parameter.shape[1]) ** -0.5))
            else:
                parameter.fill_(self.config.frequency if name == "frequency" else 0.0)

    def forward(self, length: int) -> Tensor:
        """(N, E, L) for so many tokens. Raises DataError where they are more than the model's context."""
        if length > self.context:
            raise DataError(
                f"hyena's filters reach over the model's context of {self.context} tokens, a row has {length}"
            )
        dtype = torch.float64 if self.frequency.dtype == torch.float64 else torch.float32
        steps_L = torch.arange(length, device=self.frequency.device, dtype=dtype)
        x_LF = self._features(steps_L)
        last = self.config.filter_layers
        for i in range(last + 1):
            weight, bias = self.get_parameter(f"weight_{i}"), self.get_parameter(f"bias_{i}")
            x_LF = F.linear(x_LF, weight.to(dtype), bias.to(dtype))
            if i < last:
                x_LF = torch.sin(self.frequency.to(dtype) * x_LF)
        decay_EL = torch.exp(-self._rates(steps_L)[:, None] * steps_L / max(self.context - 1, 1)) + self.config.shift
        return x_LF.mT.unflatten(0, (self.config.order, self.width)) * decay_EL

    def _features(self, steps_L: Tensor) -> Tensor:
        """(L, 2·bands + 1): the position as a fraction of the context, and sines and cosines of it."""
        bands = torch.linspace(
            1e-4, self.config.bands - 1, self.config.bands, device=steps_L.device, dtype=steps_L.dtype
        )
        angles_LB = 2 * math.pi * steps_L[:, None] / self.context * bands
        return torch.cat((steps_L[:, None] / max(self.context - 1, 1), angles_LB.cos(), -angles_LB.sin()), -1)

    def _rates(self, like: Tensor) -> Tensor:
        """(E,) α of every channel, evenly spread between the slowest and the fastest."""
        slow, fast = -math.log(FLOOR) / SLOW, -math.log(FLOOR) / FAST
        return torch.linspace(slow, fast, self.width, device=like.device, dtype=like.dtype)
