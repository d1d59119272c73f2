"""A stack of Transformer layers: decoders, encoders, both sides of encoder–decoders, and slices of them.

B batch, T new tokens, S tokens with those in the cache, E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.protocols import KeysValues
from luban.kernels.attention_mask import AttentionMask
from luban.models.arrangement.base import Block
from luban.models.arrangement.reversible import run_reversible
from luban.models.layer import LayerSpec
from luban.models.stack_checks import layer_position_shape
from luban.nn.attention.backend import AttentionBackend
from luban.nn.attention.prepared_mask import compute_dtype
from luban.nn.context import AttentionGroup, EncoderStates, ForwardContext, LayerContext, RouterTraining, RowTokens
from luban.nn.embedding import Embedding, InputEmbedding
from luban.nn.mixer.base import LayerShape
from luban.nn.position.base import Position, PositionShape

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


class LayersPolicy(Protocol):
    """How consecutive layers run, and what they save for the backward pass."""

    def run(self, blocks: Sequence[tuple[nn.Module, LayerContext]], x_BTE: Tensor) -> Tensor:
        """(B, T, E) → (B, T, E) through the blocks, gradients enabled."""
        ...


class Layers(nn.ModuleDict):
    """The blocks of a stack by the first layer that uses each. The layers are run here, apart from what stands before and
    behind them, so that hooks can divide the tokens among processes and take the hidden states from another process."""

    remat: LayersPolicy | None = None
    before: Callable[[nn.Module], None] | None = (
        None  # called with a block that is about to run: its weights may be on their way
    )
    after: Callable[[nn.Module, Tensor], None] | None = None  # called with a block that has run, and its output

    def forward(self, x_BTE: Tensor, ctx: ForwardContext, block_of: Mapping[int, str]) -> Tensor:
        """(B, T, E) → (B, T, E) through the layers; `block_of`: layer index → key of its block."""
        return self.run(x_BTE, ctx, block_of, block_of)

    def run(self, x_BTE: Tensor, ctx: ForwardContext, block_of: Mapping[int, str], layers: Iterable[int]) -> Tensor:
        """The same through some of the layers."""
        blocks: list[tuple[Any, LayerContext]] = [(self[block_of[index]], ctx.layer(index)) for index in layers]
        if self.remat is not None and blocks and torch.is_grad_enabled():
            if self.before is not None:
                for block, _ in blocks:
                    self.before(block)
            return self.remat.run(blocks, x_BTE)
        together: list[Any] = []  # reversible layers, run together
        for block, layer in blocks:
            if self.before is not None:
                self.before(block)
            if block.reversible:
                together.append((block, layer))
                continue
            x_BTE, together = _finished(x_BTE, together), []
            x_BTE = block(x_BTE, layer)
            if self.after is not None:
                self.after(block, x_BTE)
        return _finished(x_BTE, together)

    def use_remat(self, remat: LayersPolicy | None) -> None:
        """Run by `remat` where gradients are enabled; None: save everything that the blocks save."""
        self.remat = remat


def _finished(x_BTE: Tensor, together: list[Any]) -> Tensor:
    """Through the reversible layers that have been collected, if any."""
    return run_reversible(x_BTE, together) if together else x_BTE  # type: ignore[call-arg]


class TransformerStack(nn.Module):
    """Embedding, layers, final norm; a pipeline slice has only some of them. Layers are numbered as in the whole model,
    also in a pipeline slice.

    Args:
        layers: layer index → layer, of those in this stack.
        depth: number of layers of the whole model's stack.
        shape: sizes for the position method.
        spec: of the model.
        embedding: token ids → (B, T, E); None: the input is hidden states.
        norm: apply the final norm, if the last layer's arrangement has one.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerSpec],
        *,
        depth: int,
        shape: PositionShape,
        spec: ModelSpec,
        embedding: InputEmbedding | None,
        norm: bool = True,
    ):
        super().__init__()
        self.embedding = embedding
        self.position = spec.position.build(shape)
        self.causal, self.width = shape.causal, spec.width
        self.blocks = Layers()
        self.block_of: dict[int, str] = {}  # layer index → key in `blocks`; shared layers map to the first one's
        self.layer_positions = nn.ModuleDict()
        methods: dict[tuple[Position, int, int] | None, int] = {None: 0}
        groups: dict[AttentionGroup, int] = {}
        self.group_of: dict[int, int | None] = {}
        for index, layer in layers.items():
            owner = index if layer.share is None else layer.share
            if owner not in self.block_of:
                layer_shape = LayerShape(spec.width, index, depth, shape.causal, spec.context)
                self.blocks[str(owner)] = layer.arrangement.build(layer, layer_shape)
            self.block_of[index] = str(owner)
            method = None
            if layer.position is not None:
                own = layer_position_shape(spec, layer, shape)
                method = (layer.position, own.heads, own.head_dim)
                if method not in methods:
                    methods[method] = len(methods)
                    self.layer_positions[str(index)] = layer.position.build(own)
            attention = layer.mixer.attention(spec.width)
            group = None if attention is None else AttentionGroup(methods[method], attention)
            self.group_of[index] = None if group is None else groups.setdefault(group, len(groups))
        self.groups = tuple(groups)
        self.mixers = {index: layer.mixer for index, layer in layers.items()}
        last = layers[max(layers)]
        self.norm = last.norm.build(spec.width) if norm and last.arrangement.final_norm else None

    def forward(self, x: Tensor, ctx: ForwardContext, segments: Tensor | None = None) -> Tensor:
        """Token ids (B, T), or hidden states (B, T, E) if there is no embedding → (B, T, E).

        Args:
            segments: (B, T) segment ids, for an embedding that has them.
        """
        mapped = ctx.map_positions(self.position)
        if self.training and torch.is_grad_enabled():  # here, since a block may run twice in a step
            for block in dict.fromkeys(self.block_of[index] for index, mixer in self.mixers.items() if mixer.online):
                self.blocks.get_submodule(f"{block}.mixer").update_statistics()  # type: ignore[operator]
        if self.embedding is not None:
            x = self.embedding(x, self.position, mapped[0], segments)
        methods = [self.position, *self.layer_positions.values()]
        ctx.prepare(methods, mapped, self.groups, self.group_of, compute_dtype(x), self._random_numbers(x))
        x = self.blocks(x, ctx, self.block_of)
        return x if self.norm is None else self.norm(x)

    def _random_numbers(self, x: Tensor) -> dict[int, Tensor]:
        """Layer → normal numbers that its mixer asks for. In training every forward draws anew (torch's own generator), and layers
        that ask for the same shape get other numbers each; else they are a function of layer and shape alone."""
        training, found = self.training and torch.is_grad_enabled(), {}
        for index, mixer in self.mixers.items():
            if (shape := mixer.random_numbers(self.width, training=training)) is not None:
                generator = None if training else torch.Generator().manual_seed(index)
                found[index] = torch.randn(shape, generator=generator).to(x.device)
        return found


def stacks_of(module: nn.Module) -> list[TransformerStack]:
    """Every Transformer stack in the module."""
    return [part for part in module.modules() if isinstance(part, TransformerStack)]


def blocks_of(module: nn.Module) -> list[Block]:
    """The blocks of every stack in the module."""
    return [part for part in module.modules() if isinstance(part, Block)]


def forward_context(
    stack: TransformerStack,
    tokens: Tensor,
    token_mask: Tensor | None,
    positions: Tensor | None,
    backend: AttentionBackend,
    *,
    documents: Tensor | None = None,
    document_starts: Tensor | None = None,
    prefix: Tensor | None = None,
    encoder: EncoderStates | None = None,
    routing: RouterTraining | None = None,
    prefixes: Mapping[int, KeysValues] | None = None,
) -> ForwardContext:
    """Build the ForwardContext; with a cache, also reserves slots for the new tokens.

    Args:
        tokens: (B, T) ids.
        token_mask: (B, T) bool, false where padding; None: no padding.
        positions: (B, T) or (1, T); None: computed here (`count_positions`).
        documents, document_starts: as in `OneSidedModel.forward`.
        prefix: (B, T) bool, True where a key is visible to every query of its document.
        encoder: the states that decoder layers cross-attend to.
        routing: what routers of experts need in training.
        prefixes: layer → keys and values (1, K, P, D) of P tokens before every text, whose positions begin at P.
    """
    queries, consecutive, key_mask = tokens.shape[1], positions is None, token_mask
    query_positions: Tensor
    if (new := backend.begin(queries, token_mask, positions)) is not None:
        query_positions, key_positions, key_mask = new
    else:
        query_positions = count_positions(tokens, token_mask, documents) if positions is None else positions
        key_positions = query_positions
    if prefixes:
        first = next(iter(prefixes.values()))[0].shape[2]
        query_positions, key_positions = query_positions + first, key_positions + first
    mask = AttentionMask(
        queries=queries,
        keys=key_positions.shape[-1],
        causal=stack.causal,
        device=tokens.device,
        token_mask=key_mask,
        documents=documents,
        document_starts=document_starts,
        prefix=prefix,
    )
    return ForwardContext(
        backend=backend,
        mask=mask,
        positions=query_positions,
        key_positions=key_positions,
        consecutive=consecutive,
        encoder=encoder,
        routing=routing,
        prefixes=prefixes,
        rows=RowTokens(
            None if documents is None else document_runs(documents),
            token_mask,
            query_positions,
            prefix=prefix is not None,
        ),
    )


def document_runs(documents: Tensor) -> Tensor:
    """(B, T): 0 for the first run of equal numbers in a row of `documents` (B, T), 1 for the next, and so on."""
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0)).long().cumsum(-1)


def count_positions(tokens: Tensor, token_mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """Positions (1 or B, T) of tokens (B, T): from 0 in each document, padding not counted.

    Args:
        token_mask: (B, T) bool, false where padding; None: no padding.
        documents: (B, T) int, a document ends where the number changes; None: one document a row.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if token_mask is not None:
        index = (token_mask.long().cumsum(dim=-1) - 1).clamp_min(0)
    if documents is None:
        return index
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=-1).values


def input_embedding(spec: ModelSpec, tokens: Embedding | None = None, *, segments: int = 0) -> InputEmbedding:
    """The embedding of a model.

    Args:
        tokens: embedding to share; None: a new one.
        segments: number of segment ids.
    """
    width = spec.body.embedding_width(spec)
    tokens = Embedding(spec.vocab_size, width) if tokens is None else tokens
    return InputEmbedding(
        tokens, width, spec.width, segments=segments, norm=spec.embedding_norm, widen=spec.body.widens_embeddings()
    )
