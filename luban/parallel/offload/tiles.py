"""Memory-centric tiling (Rajbhandari et al. 2021, ZeRO-Infinity, section 5.1.3): a linear layer runs as a sequence of smaller ones, whose
weights are read from the host one after another and dropped, so that no device needs the memory of a whole matrix.

The backward pass reads each tile once more, and its gradient leaves for the host as soon as it is complete. On a GPU the next tile is on
its way while one is multiplied.

N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.nn.linear import TORCH, Matmul, matmul_owners
from luban.parallel.remat.host import Streams


class Tiled(Matmul):
    """Matmuls by tiles of the outputs.

    Args:
        tiles: of every weight; one of fewer outputs has as many as outputs.
    """

    def __init__(self, tiles: int):
        self.tiles = tiles

    def linear(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x·weightᵀ (+ bias), (…, I) → (…, O); the weight may lie on the host."""
        y_NO = tiled_linear(x.flatten(0, -2), weight_OI, self.tiles)
        y = y_NO.unflatten(0, x.shape[:-1])
        return y if bias_O is None else y + bias_O


def use_tiles(block: nn.Module, tiles: int) -> None:
    """Let every linear layer of a block run by tiles.

    Raises:
        ConfigError: another way to multiply is in use.
    """
    for name, owner in matmul_owners(block):
        if owner.matmul is not TORCH:
            raise ConfigError(
                f"plan.offload_tiles cuts matmuls in bf16 or fp32, and {name} runs in fp8: use --train.precision bf16"
            )
        owner.matmul = Tiled(tiles)


def tiled_weights(module: nn.Module) -> list[nn.Parameter]:
    """The weights that are read by tiles."""
    owners = [owner for _, owner in matmul_owners(module) if isinstance(owner.matmul, Tiled)]
    weights = [projection.weight for owner in owners for projection in owner.projections().values()]
    return [weight for weight in weights if weight is not None]


@torch.library.custom_op("luban::tiled_linear", mutates_args=())
def tiled_linear(x_NI: Tensor, weight_OI: Tensor, tiles: int) -> Tensor:
    """x·weightᵀ (N, O), on the device of x."""
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0])
    for begin, tile in _arriving(weight_OI, tiles, x_NI.device):
        torch.mm(x_NI, tile.t(), out=y_NO.narrow(1, begin, len(tile)))
    return y_NO


@torch.library.custom_op("luban::tiled_linear_backward", mutates_args=())
def tiled_linear_backward(
    grad_NO: Tensor, x_NI: Tensor, weight_OI: Tensor, tiles: int, trained: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, I) and, where the weight lies, of the weight (O, I); no rows where it isn't trained."""
    grad_x_NI = torch.zeros_like(x_NI)
    grad_OI = torch.empty_like(weight_OI) if trained else weight_OI.new_empty(0, weight_OI.shape[1])
    for begin, tile in _arriving(weight_OI, tiles, x_NI.device):
        part_NO = grad_NO.narrow(1, begin, len(tile))
        grad_x_NI.addmm_(part_NO, tile)
        if trained:
            grad_OI.narrow(0, begin, len(tile)).copy_(part_NO.t() @ x_NI)
    return grad_x_NI, grad_OI


def _arriving(weight_OI: Tensor, tiles: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first output, tile on the device) of all tiles in order, each on its way while the one before is used."""
    parts = weight_OI.split(-(-weight_OI.shape[0] // tiles))
    begin, streams = 0, _streams(device)
    coming = _read(parts[0], streams)
    for index in range(len(parts)):
        tile, event = coming
        streams.wait(event)
        if index + 1 < len(parts):
            coming = _read(parts[index + 1], streams)
        if tile.is_cuda:
            tile.record_stream(torch.cuda.current_stream(device))
        yield begin, tile
        begin += len(tile)


@cache
def _streams(device: torch.device) -> Streams:
    return Streams(device)


def _read(part: Tensor, streams: Streams) -> tuple[Tensor, torch.cuda.Event | None]:
    """A tile that begins to come to the device."""
    with streams.copying("in"):
        return part.to(streams.device, non_blocking=True), streams.event()


@tiled_linear.register_fake
def _(x_NI: Tensor, weight_OI: Tensor, tiles: int) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0])


@tiled_linear_backward.register_fake
def _(grad_NO: Tensor, x_NI: Tensor, weight_OI: Tensor, tiles: int, trained: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NI), weight_OI.new_empty(weight_OI.shape[0] if trained else 0, weight_OI.shape[1])


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x_NI, weight_OI, ctx.tiles = inputs
    ctx.save_for_backward(x_NI, weight_OI)


def _differentiate(ctx, grad_NO: Tensor) -> tuple:
    x_NI, weight_OI = ctx.saved_tensors
    trained = ctx.needs_input_grad[1]
    grad_x_NI, grad_OI = tiled_linear_backward(grad_NO, x_NI, weight_OI, ctx.tiles, trained)
    return grad_x_NI, grad_OI if trained else None, None


tiled_linear.register_autograd(_differentiate, setup_context=_save)
