"""The pool of a paged KV cache, and which models can use one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luban.generate.cache import float_parameter
from luban.models.base import Model
from luban.nn.attention.paged_layer import PagedLayer
from luban.nn.mixer.base import AttentionShape
from luban.nn.position.base import PositionMethod

BLOCK_SIZE = 16  # slots; larger blocks waste more at the end of every sequence, smaller ones make longer tables


class PagedCache:
    """Keys and values in equal blocks that sequences hold by their tables (`luban.serve.block_manager`).

    Args:
        shapes: of every layer, None for one that doesn't attend.
        blocks: in the pool. block_size: slots a block.
        device, dtype: of keys and values. kept: see `PagedLayer`.
    """

    def __init__(
        self,
        shapes: Sequence[AttentionShape | None],
        *,
        blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        kept: torch.dtype | None = None,
    ):
        self.shapes, self.blocks, self.block_size, self.device = list(shapes), blocks, block_size, device
        self.layers = [
            None if shape is None else PagedLayer(blocks * block_size, shape, device, dtype, kept) for shape in shapes
        ]

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        blocks: int,
        block_size: int = BLOCK_SIZE,
        shapes: Sequence[AttentionShape | None] | None = None,
        kept: torch.dtype | None = None,
    ) -> PagedCache:
        """On the model's device, in its precision or as `PagedLayer` says of `kept`. `shapes`: of the layers here; None: the model's."""
        spec, weight = model.spec, float_parameter(model)
        if shapes is None:
            shapes = [layer.mixer.attention(spec.width) for layer in spec.layers]
        return cls(shapes, blocks=blocks, block_size=block_size, device=weight.device, dtype=weight.dtype, kept=kept)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks: (source, copy) each; every source is read before any copy is written."""
        if not pairs:
            return
        sources, copies = torch.tensor(pairs, device=self.device).unbind(1)
        for blocks in self.parts():
            blocks[copies] = blocks[sources]

    def parts(self) -> list[Tensor]:
        """What all layers keep, keys and values first, by blocks, (blocks, block size, K, …) each: views of the pool."""
        pools = [pool for layer in self.layers if layer is not None for pool in layer.pools()]
        return [pool.unflatten(0, (self.blocks, self.block_size)) for pool in pools]


def paging_refusal(model: Model) -> str | None:
    """Why a model's keys and values can't be kept in pages; None where they can. Such models keep a contiguous cache."""
    body = model.spec.body
    if not body.cached and not body.two_sided:
        return "it keeps no keys and values"
    if getattr(model, "prompts", None) is not None:
        return "its adapter puts keys and values before every text"
    for layer in model.spec.layers:
        shape = layer.mixer.attention(model.spec.width)
        if layer.mixer.state_spec(model.spec.width) or (shape is not None and not shape.masked):
            name = layer.mixer.registry.name_of(type(layer.mixer))
            return f"its mixer {name} keeps other numbers of every token than keys and values"
    decoder = model.get_submodule("decoder") if body.two_sided else model  # an encoder keeps nothing
    for method in decoder.modules():
        if isinstance(method, PositionMethod) and method.by_length:
            return "its positions depend on how long a sequence is, so that keys change while it grows"
        if isinstance(method, PositionMethod) and method.biased and method.bias_form is None:
            return "its positions add a bias that is no function of the distance"
    return None
