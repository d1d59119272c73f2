"""A mixture of experts in the place of a feed-forward network (Shazeer et al. 2017; Lepikhin et al. 2021).

B rows, T tokens, N = B·T, E model width, X experts, k experts a token, M rows that experts read (N·k, less dropped ones).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.nn.context import LayerContext, RouterTraining
from luban.nn.feedforward.base import FeedForward
from luban.nn.linear import Projection
from luban.nn.mixer.base import LayerShape
from luban.nn.moe.experts import Experts
from luban.nn.moe.router import Router
from luban.nn.moe.routing import Choices, Tally, attach_loss, balance_loss, counts_by_row, router_z_loss
from luban.nn.moe.top_k import TopK

Network = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts(FeedForward):
    """Several feed-forward networks of inner width `width`; a router gives every token some of them."""

    tokenwise: ClassVar[bool] = False
    experts: int = 8  # how many there are
    network: Network = "swiglu"  # what each expert is
    router: Router = field(default_factory=TopK)  # how a token chooses its experts

    def __post_init__(self):
        super().__post_init__()
        if self.experts < 1:
            raise ConfigError(f"a mixture needs at least 1 expert, {self.experts} given")
        if self.bias:
            raise ConfigError("experts have no biases: leave feedforward.bias out")
        if self.registry.entries.get(self.network) is None or self.network == "moe":
            raise ConfigError(f"an expert is a plain or gated network, not {self.network}")
        self.router.check(self.experts)

    @property
    def expert(self) -> FeedForward:
        """One expert as a dense network."""
        return self.registry[self.network](width=self.width)

    def build(self, shape: LayerShape) -> nn.Module:
        """The module."""
        return MoELayer(self, shape)

    def describe(self, graph: GraphBuilder, x_BTE: GraphTensor) -> GraphTensor:
        """Record router, dispatch, the chosen experts' matmuls and the weighted sum, (B, T, E) → (B, T, E)."""
        width, rows = x_BTE.shape[-1], x_BTE.elements // x_BTE.shape[-1] * self.router.chosen
        wide = "float64" if graph.dtype == "float64" else "float32"
        logits = graph.linear("router", x_BTE, self.experts, role="router", dtype=wide)
        read = graph.add("dispatch", "gather", x_BTE, shape=(rows, width), saved_elements=rows * width)
        experts, share = graph.scope("experts"), self.router.chosen / self.experts

        def multiplied(name: str, x: GraphTensor, outputs: int) -> GraphTensor:
            return experts.add(
                name,
                "linear",
                x,
                shape=(rows, outputs),
                role="expert",
                flops=2 * x.elements * outputs,
                parameters=self.experts * x.shape[-1] * outputs,
                active_share=share,
                saved_elements=rows * outputs,
                in_features=x.shape[-1],
                out_features=outputs,
            )

        inner = [multiplied(name, read, self.width) for name in (("gate", "up") if self.expert.gated else ("up",))]
        first = inner[0]
        product = experts.add("activation", "activation", *inner, shape=first.shape, saved_elements=first.elements)
        return graph.add("combine", "combine", multiplied("down", product, width), logits, shape=x_BTE.shape)


class Exchange:
    """Computes experts on rows; this one has all of them. `luban.parallel.expert` sends rows to the processes that have theirs."""

    def row_sum(self, local: Tensor) -> Tensor:
        """(B, …) sums over the tokens of this process → over whole rows."""
        return local

    def mine(self, rows_N: Tensor) -> Tensor | None:
        """(M,) bool, of the tokens with these numbers, those that this process sends to experts; None: all."""
        return None

    def run(self, experts: Experts, rows_ME: Tensor, experts_M: Tensor, count: int) -> Tensor:
        """(M, E) → (M, E), each row through its expert.

        Args:
            experts_M: numbers of the experts, ascending; count: X.
        """
        return experts(rows_ME, counted(experts_M, count))


LOCAL = Exchange()


def counted(experts_M: Tensor, count: int) -> Tensor:
    """(X,) int64: how often each number occurs."""
    found = torch.zeros(count, dtype=torch.int64, device=experts_M.device)
    return found.scatter_add_(0, experts_M, torch.ones_like(experts_M))


class RouterLinear(Projection):
    """Logits of the experts, in float32 whatever the model's precision (Fedus et al. 2022, section 2.4)."""

    def __init__(self, width: int, experts: int):
        super().__init__(width, experts, bias=False, role="router")

    def forward(self, x_BTE: Tensor) -> Tensor:
        """(B, T, E) → (B, T, X), float32 (float64 for float64 models)."""
        wide = torch.promote_types(x_BTE.dtype, torch.float32)
        return nn.functional.linear(x_BTE.to(wide), self.weight.to(wide))


class MoELayer(nn.Module):
    """Router and experts."""

    def __init__(self, config: MixtureOfExperts, shape: LayerShape):
        super().__init__()
        self.choice, self.count, self.layer = config.router, config.experts, shape.index
        self.router = RouterLinear(shape.width, config.experts)
        expert = config.expert
        self.experts = Experts(config.experts, shape.width, config.width, type(expert).activation, gated=expert.gated)
        self.exchange = LOCAL
        self.tally = Tally(config.experts)

    @torch._disable_dynamo  # torch.compiler.disable, which would import all of torch._dynamo now
    def forward(self, x_BTE: Tensor, ctx: LayerContext | None = None) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        training = None if ctx is None else ctx.routing
        logits_BTX = self.router(x_BTE)
        probabilities_BTX = logits_BTX.softmax(-1)
        choices = self.choice.choose(probabilities_BTX, training, self.layer)
        if training is not None:
            x_BTE = self._with_losses(x_BTE, logits_BTX, probabilities_BTX, choices, training)
        return self._computed(x_BTE.flatten(0, 1), choices).view_as(x_BTE)

    def _computed(self, x_NE: Tensor, choices: Choices) -> Tensor:
        """The weighted sum of the chosen experts' outputs, (N, E)."""
        chosen = self.choice.chosen
        experts_M, order = choices.experts_BTk.flatten().sort(stable=True)  # order: numbers of choices, N·k of them
        mine = self.exchange.mine(order // chosen)
        if choices.kept_BTk is not None:
            kept = choices.kept_BTk.flatten()[order]
            mine = kept if mine is None else mine & kept
        if mine is not None:
            experts_M, order = experts_M[mine], order[mine]
        y_ME = self.exchange.run(self.experts, x_NE.index_select(0, order // chosen), experts_M, self.count)
        weights_M = choices.weights_BTk.flatten().index_select(0, order).to(y_ME.dtype)
        found = y_ME.new_zeros(x_NE.shape[0] * chosen, x_NE.shape[1])
        return found.index_copy(0, order, y_ME * weights_M[:, None]).view(-1, chosen, x_NE.shape[1]).sum(1)

    def _with_losses(
        self, x_BTE: Tensor, logits_BTX: Tensor, probabilities_BTX: Tensor, choices: Choices, training: RouterTraining
    ) -> Tensor:
        """x, with the auxiliary losses' gradient attached and the router's figures counted in the backward pass."""
        valid, row_sum, router = training.valid_BT, self.exchange.row_sum, self.choice
        weights_B = training.weights_B.to(logits_BTX.dtype)
        counts_BX = counts_by_row(choices.experts_BTk, self.count, valid, logits_BTX.dtype)
        first = choices.experts_BTk[..., : router.balanced()]
        counted_BX = counts_by_row(first, self.count, valid, logits_BTX.dtype)
        balance_B = balance_loss(probabilities_BTX, counted_BX, valid, row_sum)
        z_B = router_z_loss(logits_BTX, valid, row_sum)
        loss = (weights_B * (router.balance * balance_B + router.z_loss * z_B)).sum()
        with torch.no_grad():
            counts_X = counts_BX.sum(0)
            asked, dropped = counts_X.sum(), counts_X.new_zeros(())
            if choices.kept_BTk is not None and choices.dropped is not None:
                dropped = choices.dropped.to(counts_X.dtype)
                asked = choices.kept_BTk.sum() + dropped
            sums = [asked, dropped, (weights_B * balance_B).sum(), (weights_B * z_B).sum(), weights_B.sum()]
            figures = torch.cat([counts_X, torch.stack(sums)])
        return attach_loss(x_BTE, loss, figures, self.tally)
