"""Tensor and sequence parallelism: matrices divided among processes by their roles, tokens between the layers.

A layer's parts (attention, feed-forward) read all tokens and hold some heads or inner channels: first matrices by columns,
last ones by rows, so that a part gives a sum of which every process has a term (Shoeybi et al. 2020, section 3). Between
the parts each process has some of the tokens (Korthikanti et al. 2022, section 4.2). So a part gathers tokens in front and
adds up terms behind it, while it scatters the tokens. Embedding and output layer are divided by the vocabulary.

What stands outside the layers is computed by all processes alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.plan import even_runs
from luban.models.arrangement.base import Block
from luban.models.base import Model
from luban.models.stack import Layers, stacks_of
from luban.nn.embedding import Embedding
from luban.nn.linear import Projection, matmul_owners
from luban.nn.lm_head import LMHead
from luban.nn.moe.layer import MoELayer
from luban.nn.roles import Role, roles_of
from luban.parallel.collectives import (
    Peers,
    copy_to_parts,
    gather_tokens,
    join_tokens,
    scatter_parts,
    slice_tokens,
)
from luban.parallel.heads import HeadRuns, head_runs
from luban.parallel.placement import Placement, Placements, Run, on_first
from luban.parallel.vocabulary import DividedEmbedding, DividedVocabulary, enter_head

# Role of a weight → the dimension that is divided. All others are whole in every process.
DIVIDED: dict[Role, int] = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1}
PARTS = ("mixer", "cross", "feedforward")  # of a block


def divide(
    model: Model, peers: Peers, group: Any, *, experts: bool = True, tokens: type[WholeTokens] | None = None
) -> Placements:
    """Divide a model on the meta device: parameters shrink to the parts of this process, and hooks communicate.

    Args:
        experts: divide the inner channels of every expert; else plan.expert divides the experts themselves.
        tokens: what the processes have of the tokens between the parts of a layer; None: a slice each (`SlicedTokens`).

    Raises:
        ConfigError: there are more processes than heads, inner channels or words; the message names a plan that fits.
    """
    divided: dict[int, Placement] = {}  # by the parameter as it was
    for stack in stacks_of(model):
        hooks = (tokens or SlicedTokens)(peers)
        hooks.around_layers(stack.blocks)
        for block in stack.blocks.values():
            assert isinstance(block, Block)
            for name in PARTS:
                part = getattr(block, name)
                if part is None:
                    continue
                if experts or not isinstance(part, MoELayer):
                    divided |= _part_placements(part, peers.size)
                by_token = name == "feedforward" and not isinstance(part, MoELayer)
                (hooks.around_feedforward if by_token else hooks.around_part)(part)
    divided |= _divide_vocabulary(model, peers)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    placed = {names[key]: placement for key, placement in divided.items()}
    partial = frozenset(_partial(model)) - placed.keys()
    _shrink(model, divided, peers.rank)
    return Placements(placed, partial, peers.rank, peers.size, group)


def check_tensor(model: Model, ranks: int) -> None:
    """Raise ConfigError if a model on the meta device can't be divided among so many processes."""
    for stack in stacks_of(model):
        for block in stack.blocks.values():
            for part in filter(None, (getattr(block, name) for name in PARTS)):
                _part_placements(part, ranks)
    _even(model.spec.vocab_size, ranks, "words of the vocabulary")


@dataclass
class WholeTokens:
    """Hooks of one stack whose layers have all tokens in every process, without gradients: one sum behind each part, in the
    place of a gathering before and a scattering behind it (Shoeybi et al. 2020, section 3)."""

    peers: Peers

    def around_layers(self, layers: nn.Module) -> None:
        """Nothing: all processes read the same hidden states."""

    def around_part(self, part: nn.Module) -> None:
        """Add up the parts' terms."""
        part.register_forward_hook(self.sum)

    def around_feedforward(self, part: nn.Module) -> None:
        """As around any part; what it gives for a token depends on that token alone."""
        self.around_part(part)

    def sum(self, part: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """(B, T, E), the sum of what the processes' parts give."""
        return self.peers.sum_(out)


@dataclass
class SlicedTokens(WholeTokens):
    """Hooks of one stack: its layers work on a slice of the tokens, their parts on all of them."""

    tokens: int = 0  # T of the current forward

    def around_layers(self, layers: nn.Module) -> None:
        """Slice the tokens in front of the layers and join them behind."""
        layers.register_forward_pre_hook(self.enter)
        layers.register_forward_hook(self.leave)

    def around_part(self, part: nn.Module) -> None:
        """Gather the tokens in front of a part, scatter the sum behind it."""
        part.register_forward_pre_hook(self.gather)
        part.register_forward_hook(self.scatter)

    def enter(self, layers: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Slice the hidden states that go into the layers, and let all layers share the gradient of encoder states."""
        x_BTE, ctx, *rest = args
        self.tokens = x_BTE.shape[1]
        if ctx.encoder is not None and ctx.encoder.states is not None:
            ctx.encoder.states = copy_to_parts(ctx.encoder.states, self.peers)
        return (slice_tokens(x_BTE, self.peers), ctx, *rest)

    def leave(self, layers: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Join what comes out of the layers."""
        return join_tokens(out, self.peers, self.tokens)

    def gather(self, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All tokens, for a part of a layer."""
        return (gather_tokens(args[0], self.peers, self.tokens), *args[1:])

    def scatter(self, part: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The sum of the parts' terms, in slices."""
        return scatter_parts(out, self.peers)


class OverlappedTokens(SlicedTokens):
    """The same for compiled layers: feed-forwards work on two halves of the tokens, of which one is computed while the other
    is gathered, or the sum of its terms scattered. The compiler must be told to put messages beside what doesn't depend on
    them (`compiled_loss`); gradients of weights are computed beside messages then, too."""

    def around_feedforward(self, part: nn.Module) -> None:
        """Gather, compute and scatter by halves."""
        part.forward = functools.partial(self.by_halves, part.forward)

    def by_halves(self, forward: Callable[..., Tensor], x_BTE: Tensor, *args: Any) -> Tensor:
        """(B, ⌈T/N⌉, E) of this process's tokens → the same, through the parts of all processes."""
        halves = x_BTE.chunk(2, 1)
        whole = [gather_tokens(half, self.peers, half.shape[1] * self.peers.size) for half in halves]
        return torch.cat([scatter_parts(forward(half, *args), self.peers) for half in whole], 1)


def _part_placements(part: nn.Module, ranks: int) -> dict[int, Placement]:
    """Placements of the projections of one part of a block."""
    if isinstance(part, MoELayer):
        return _expert_channels(part, ranks)
    found: dict[int, Placement] = {}
    projections = [p for _, owner in matmul_owners(part) for p in owner.projections().values()]
    roles: dict[int, Role] = {id(p): p.parameter_roles["weight"] for p in projections}
    heads = _heads_of(part, projections, roles, ranks)
    for projection in projections:
        role = roles[id(projection)]
        if role not in DIVIDED:
            raise ConfigError(f"plan.tensor can't divide {type(part).__name__}, whose weights have the role {role}")
        dim = DIVIDED[role]
        runs = heads.of(role) if heads else _even(projection.weight.shape[dim], ranks, "feed-forward channels")
        found[id(projection.weight)] = Placement(tuple(projection.weight.shape), dim, runs)
        if projection.bias is not None:  # behind a sum it is added once
            shape = tuple(projection.bias.shape)
            found[id(projection.bias)] = Placement(shape, 0, runs) if dim == 0 else on_first(shape, ranks)
    return found


def _expert_channels(layer: MoELayer, ranks: int) -> dict[int, Placement]:
    """Placements of the inner channels of all experts: rows of gate and up, columns of down."""
    experts, found = layer.experts, {}
    for projection, dim in ((experts.gate, 1), (experts.up, 1), (experts.down, 2)):
        if projection is not None:
            shape = tuple(projection.weight.shape)
            found[id(projection.weight)] = Placement(shape, dim, _even(shape[dim], ranks, "channels of an expert"))
    return found


def _heads_of(part: nn.Module, projections: list[Projection], roles: dict[int, Role], ranks: int) -> HeadRuns | None:
    sizes = {roles[id(p)]: p.out_features for p in projections}
    if "q" not in sizes:
        return None
    head_dim: int = part.head_dim  # type: ignore[assignment]
    return head_runs(sizes["q"] // head_dim, sizes["k"] // head_dim, head_dim, ranks)


def _even(total: int, ranks: int, what: str) -> tuple[tuple[Run, ...], ...]:
    if total < ranks:
        raise ConfigError(f"plan.tensor {ranks} divides {total} {what}: use at most --plan.tensor {total}")
    return tuple((run,) for run in even_runs(total, ranks))


def _divide_vocabulary(model: Model, peers: Peers) -> dict[int, Placement]:
    """Placements and hooks of the tables with a row a word, and of output layers."""
    found: dict[int, Placement] = {}
    for module in model.modules():
        if isinstance(module, Embedding) and module.num_embeddings == model.spec.vocab_size:
            runs = _even(module.num_embeddings, peers.size, "words of the vocabulary")
            (first, past) = runs[peers.rank][0]
            lookup = DividedEmbedding(peers, first, past - first)
            module.register_forward_pre_hook(lookup.enter)
            module.register_forward_hook(lookup.leave)
        elif isinstance(module, LMHead):
            runs = _even(module.out_features, peers.size, "words of the vocabulary")
            module.use_vocabulary(DividedVocabulary(peers, runs[peers.rank][0][0], module.out_features))
            module.register_forward_pre_hook(enter_head(peers))
            if module.bias is not None:
                found[id(module.bias)] = Placement(tuple(module.bias.shape), 0, runs)
        else:
            continue
        found[id(module.weight)] = Placement(tuple(module.weight.shape), 0, runs)
    return found


def _partial(model: Model) -> Iterator[str]:
    """Names of parameters that see only some of the tokens (in the layers) or of the heads (biases on scores)."""
    for prefix, module in model.named_modules():
        acts = isinstance(module, Layers) or getattr(module, "biased", False)
        if acts:
            yield from (f"{prefix}.{name}" for name, _ in module.named_parameters())


def _shrink(model: nn.Module, divided: dict[int, Placement], rank: int) -> None:
    """Replace every divided parameter by this process's part; what was shared stays shared."""
    made: dict[int, nn.Parameter | None] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = divided.get(id(parameter))
            if placement is None:
                continue
            if id(parameter) not in made:
                empty = parameter.new_empty(placement.local_shape(rank))
                made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad) if empty.numel() else None
            setattr(module, name, made[id(parameter)])
    roles_of(model)  # every parameter still has its owner
